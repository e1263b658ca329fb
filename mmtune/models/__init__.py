"""Models: where their components are, and how a vision encoder and a language model become one."""
