"""The ``jrs`` command: thin verbs, heavy imports inside them."""
