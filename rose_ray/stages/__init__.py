"""The steps of the method, one file each, as plain functions that know neither Ray nor DeepSpeed."""
