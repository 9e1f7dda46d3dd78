"""Images in, batches out, independent of any model."""
