"""Serving: engines with an OpenAI-compatible API, and the check that what is served is what was trained."""
