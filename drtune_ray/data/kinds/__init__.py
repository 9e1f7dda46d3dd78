"""The kinds of sources of images, one module a kind; `recognize` chooses among them."""
