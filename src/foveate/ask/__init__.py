"""Asking a model about pictures: engine, conversation, answer."""
