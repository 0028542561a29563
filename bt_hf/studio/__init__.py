"""A page on which a person clicks, and watches a model learn their taste; `bt-hf studio` opens it."""
