"""Answers over HTTP, in OpenAI's protocol, many at once."""
