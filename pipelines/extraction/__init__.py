"""From clips to rows of the store: what is new, decode, embed, stage."""
