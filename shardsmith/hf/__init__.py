"""A Hugging Face directory: config, template, layouts, completion, checks."""
