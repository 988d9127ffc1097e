"""`firefly templates verify`: the template certificate of a model, without training anything."""

from __future__ import annotations

from firefly.config import ModelConfig
from firefly.data.certificate import Certificate, certify
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.models.loading import load_tokenizer, stop_ids_of


def verify_template(model: ModelConfig, template_name: str = "auto", date: str | None = None) -> Certificate:
    """Certify a template on a model's tokenizer and generation_config; the weights are not needed.

    Raises:
        UsageError: no such model or template, or the template's stop is not one token.
    """
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, bind_template(template_name, tokenizer, date=date))
    return certify(encoder, stop_ids_of(model))
