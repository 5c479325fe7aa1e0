"""From a corpus's own files to rows of clips and questions."""
