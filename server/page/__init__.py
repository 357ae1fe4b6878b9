"""The page at /ui: files that a browser runs, which talk to the REST interface as any other client does."""
