"""Images in, batches out; knows no model."""
