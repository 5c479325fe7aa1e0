"""Pages that need no network: templates, styles, small pictures."""
