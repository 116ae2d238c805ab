"""The ``distckpt`` command: each subcommand is a few lines over a public function. Heavy imports wait for their use."""
