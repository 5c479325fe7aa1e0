"""Self-contained pages: templates, styles, previews."""
