"""Any text encoder of transformers in TEXT: all tokens of an expression.

The folder's config.json says which one it is (`model_type`), and its tokenizer is checked against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from samlove.config import TextConfig
from samlove.errors import RequestError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions, to_store
from samlove.features.encoders.transformers_folder import (
    load_network,
    load_tokenizer,
    model_type,
    resolve_folder,
    sha256_model,
)

NAME = "distilbert/distilroberta-base"  # the paper's, on the Hugging Face Hub
NO_POOLER = {"add_pooling_layer": False}  # released weights often have no pooler, and only tokens are stored


@dataclass(frozen=True)
class TextModel:
    """A family of text encoders.

    network, tokenizers: names of classes in transformers; the folder has one of these tokenizers. options: arguments of
    the network. ids: special tokens whose numbers in config.json are the tokenizer's. spare: the network may have up to
    this many more words than the tokenizer. offset: positions start after the padding token's number, as in RoBERTa.
    endless: no table of positions, so no longest text. fills: trained on texts in lower case that are padded to all
    positions, without an attention mask, as SigLIP and SigLIP 2 are (huggingface/transformers, pull request 43101).
    """

    network: str
    tokenizers: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[str, ...] = ("pad_token_id",)
    spare: int = 0
    offset: bool = False
    endless: bool = False
    fills: bool = False

    def longest(self, config: Any) -> int | None:
        """Tokens that a text may have, with start and end token; None: any number."""
        if self.endless:
            return None
        return config.max_position_embeddings - (config.pad_token_id + 1 if self.offset else 0)


ALL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CLIP = TextModel("CLIPTextModel", ("CLIPTokenizer",), ids=())  # OpenAI's config.json has other numbers
SIGLIP = TextModel("SiglipTextModel", ("SiglipTokenizer", "GemmaTokenizer", "Siglip2Tokenizer"), ids=(), fills=True)
TEXT = {  # by model_type
    "bert": TextModel("BertModel", ("BertTokenizer",), NO_POOLER),
    "distilbert": TextModel("DistilBertModel", ("BertTokenizer", "DistilBertTokenizer")),
    "electra": TextModel("ElectraModel", ("BertTokenizer", "ElectraTokenizer")),
    "roberta": TextModel("RobertaModel", ("RobertaTokenizer",), NO_POOLER, ALL_IDS, offset=True),
    "xlm-roberta": TextModel("XLMRobertaModel", ("XLMRobertaTokenizer",), NO_POOLER, ALL_IDS, offset=True),
    "camembert": TextModel("CamembertModel", ("CamembertTokenizer",), NO_POOLER, ALL_IDS, offset=True),
    "mpnet": TextModel("MPNetModel", ("MPNetTokenizer",), NO_POOLER, ALL_IDS, offset=True),
    "t5": TextModel("T5EncoderModel", ("T5Tokenizer",), spare=128, endless=True),
    "clip": CLIP,
    "clip_text_model": CLIP,
    "siglip": SIGLIP,
    "siglip_text_model": SIGLIP,
}


class TextEncoder(OnDevice):
    """An expression -> text (L,d) and text_mask (L,) bool, True at tokens; padded or truncated to L tokens.

    `text` is transformers' `last_hidden_state`. At padding it holds the network's output, which text_mask tells readers
    to ignore. The weights of CLIP and SigLIP may be the whole model or only its text encoder.
    """

    def __init__(self, config: TextConfig, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing or of an unknown encoder."""
        self.config, self.device = config, device
        self.folder = resolve_folder(config.weights, "a text encoder", NAME, tuple(TEXT))
        self.type = model_type(self.folder)
        self.model = TEXT[self.type]

    def fingerprint(self) -> dict:
        return {
            "encoder": self.type.removesuffix("_text_model"),
            "weights_sha256": sha256_model(self.folder),
            "max_tokens": self.config.max_tokens,
            "layer": "last_hidden_state",
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "transformers", "tokenizers"),
        }

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.model.tokenizers, self.network, self.model.ids, self.model.spare)

    @cached_property
    def network(self) -> Any:
        network = load_network(self.model.network, self.folder, **self.model.options).to(self.device)
        longest = self.model.longest(network.config)
        if longest is not None and self.config.max_tokens > longest:
            raise RequestError(
                f"{self.folder}: takes at most {longest} tokens, found max_tokens: {self.config.max_tokens}; "
                "lower it in configs/*/text.yaml"
            )
        return network

    def load(self, source: str) -> str:
        """The expression itself; `encode` tokenises all expressions of a batch together."""
        return source

    @torch.inference_mode()
    def encode(self, items: list[str]) -> list[Arrays]:
        """One {text (L,d) of the configured dtype, text_mask (L,) bool} per expression."""
        length = self.config.max_tokens
        tokens = self.tokenizer(
            [text.lower() for text in items] if self.model.fills else items,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]  # (expressions, L) each
        given = {"input_ids": ids, "attention_mask": mask}
        if self.model.fills:
            more = self.network.config.max_position_embeddings - length
            given = {"input_ids": pad(ids, (0, more), value=self.tokenizer.pad_token_id)}
        hidden: Tensor = self.network(**given).last_hidden_state[:, :length]  # (expressions, L, d)
        text = to_store("text", hidden, self.config.dtype)
        return [{"text": t, "text_mask": m} for t, m in zip(text, mask.bool().cpu().numpy(), strict=True)]
