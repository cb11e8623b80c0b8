"""RoBERTa (Liu et al., 2019), distilled as DistilRoBERTa, through transformers: all tokens of an expression."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samlove.config import TextConfig
from samlove.errors import RequestError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions, to_store
from samlove.features.encoders.transformers_folder import load_network, load_tokenizer, resolve_folder, sha256_model


class RobertaEncoder(OnDevice):
    """An expression -> text (L,d) and text_mask (L,) bool, True at tokens; padded or truncated to L tokens.

    At padding, `text` holds the network's output, which text_mask tells readers to ignore.
    """

    what, name = "DistilRoBERTa", "distilbert/distilroberta-base"
    model_types: tuple[str, ...] = ("roberta",)
    family = "RobertaTokenizer"
    ids: tuple[str, ...] = ("bos_token_id", "eos_token_id", "pad_token_id")

    def __init__(self, config: TextConfig, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing."""
        self.config, self.device = config, device
        self.folder = resolve_folder(config.weights, self.what, self.name, self.model_types)

    def fingerprint(self) -> dict:
        return {
            "encoder": self.config.encoder,
            "weights_sha256": sha256_model(self.folder),
            "max_tokens": self.config.max_tokens,
            "layer": "last_hidden_state",
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "transformers", "tokenizers"),
        }

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.family, self.network, self.ids)

    @cached_property
    def network(self) -> Any:
        network = self._load_network().to(self.device)
        longest = self._longest(network.config)
        if self.config.max_tokens > longest:
            raise RequestError(
                f"{self.folder}: takes at most {longest} tokens, found max_tokens: {self.config.max_tokens}; "
                "lower it in configs/*/text.yaml"
            )
        return network

    def _load_network(self) -> Any:
        from transformers import RobertaModel

        return load_network(RobertaModel, self.folder, add_pooling_layer=False)  # the released weights have no pooler

    def _longest(self, config: Any) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa's positions start at pad_token_id + 1

    def load(self, source: str) -> str:
        """The expression itself; `encode` tokenises all expressions of a batch together."""
        return source

    @torch.inference_mode()
    def encode(self, items: list[str]) -> list[Arrays]:
        """One {text (L,d) of the configured dtype, text_mask (L,) bool} per expression."""
        tokens = self.tokenizer(
            items, padding="max_length", truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]  # (expressions, L) each
        hidden: Tensor = self.network(input_ids=ids, attention_mask=mask).last_hidden_state  # (expressions, L, d)
        text = to_store("text", hidden, self.config.dtype)
        return [{"text": t, "text_mask": m} for t, m in zip(text, mask.bool().cpu().numpy(), strict=True)]
