"""Look into a model in the browser: a page over a session, served here or written for any web host."""
