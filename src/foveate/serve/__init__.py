"""Answers over HTTP, in OpenAI's protocol."""
