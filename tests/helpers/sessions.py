"""A session around a model that a test has made, without reading the model's directory again."""

from __future__ import annotations

from engine.session import ModelConfig, Session
from model.chat import Chat
from model.llama import Llama


def session_of(model: Llama, chat: Chat) -> Session:
    """A session of one process; its settings are empty and its fingerprint is a word."""
    return Session(ModelConfig(model="made"), model, chat, fingerprint="fingerprint", settings={})
