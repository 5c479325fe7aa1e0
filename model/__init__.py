"""ImageBind's towers, and R²ScP: experts, purification, router, decoder."""
