"""The engine as a service: a thread that steps it, and an HTTP server that OpenAI's clients can drive."""
