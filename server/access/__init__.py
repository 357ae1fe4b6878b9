"""Who may do what: roles, tokens, the table of what each role may call, and the certificates of both doors."""
