"""Small checkpoints of many families of encoders in their official formats: random weights, with their tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import samlove.model.torchvision_ops  # noqa: F401  (transformers imports torchvision)

WORDS = ["the", "red", "star", "on", "left", "it", "loud"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # so that the input matters
}
PIECES = [("▁" + word, -1.0) for word in WORDS]


def _wordpieces(names: list[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate([*names, *WORDS])}


def _bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel, BertTokenizer

    vocab = _wordpieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    return BertModel(BertConfig(vocab_size=len(vocab), max_position_embeddings=40, **SIZES))


def _distilbert(folder: Path) -> Any:
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    vocab = _wordpieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.5}
    return DistilBertModel(DistilBertConfig(vocab_size=len(vocab), max_position_embeddings=40, **sizes))


def _electra(folder: Path) -> Any:
    from transformers import BertTokenizer, ElectraConfig, ElectraModel

    vocab = _wordpieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    sizes = {**SIZES, "embedding_size": 8}
    return ElectraModel(ElectraConfig(vocab_size=len(vocab), max_position_embeddings=40, **sizes))


def _mpnet(folder: Path) -> Any:
    from transformers import MPNetConfig, MPNetModel, MPNetTokenizer

    vocab = _wordpieces(["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"])
    MPNetTokenizer(vocab=vocab).save_pretrained(folder)
    return MPNetModel(MPNetConfig(vocab_size=len(vocab), max_position_embeddings=42, **SIZES))


def _xlm_roberta(folder: Path) -> Any:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaTokenizer

    names = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *PIECES, ("<mask>", 0.0)]
    XLMRobertaTokenizer(vocab=names).save_pretrained(folder)
    config = XLMRobertaConfig(vocab_size=len(names), max_position_embeddings=42, type_vocab_size=1, **SIZES)
    return XLMRobertaForMaskedLM(config)


def _t5(folder: Path) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    names = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -3.0), ("▁", -2.0), *PIECES]
    tokenizer = T5Tokenizer(vocab=names, extra_ids=2)
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer) + 5, **sizes))


def _siglip(folder: Path) -> Any:
    """SigLIP 2 of fixed resolution: SigLIP with Gemma's tokenizer."""
    from transformers import GemmaTokenizer, SiglipConfig, SiglipModel

    letters = sorted({letter for word in WORDS for letter in word})
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters]
    tokenizer = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], add_eos_token=True)
    tokenizer.save_pretrained(folder)
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}))


TEXT: dict[str, Callable[[Path], Any]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "electra": _electra,
    "mpnet": _mpnet,
    "xlm-roberta": _xlm_roberta,
    "t5": _t5,
    "siglip": _siglip,
}


def _ast(folder: Path) -> Any:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    ASTFeatureExtractor(num_mel_bins=32).save_pretrained(folder)
    return ASTForAudioClassification(ASTConfig(num_mel_bins=32, num_labels=3, **SIZES))


def clap(folder: Path, fusion: bool = False) -> Any:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    ClapFeatureExtractor(truncation="fusion" if fusion else "rand_trunc").save_pretrained(folder)
    audio = {
        "patch_embeds_hidden_size": 4,
        "hidden_size": 32,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "enable_fusion": fusion,
        "aff_block_r": 2,
    }
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 20}
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))


def _whisper(folder: Path) -> Any:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    WhisperFeatureExtractor(feature_size=32).save_pretrained(folder)
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=30, num_mel_bins=32, **sizes, **ends))


def _wav2vec2(folder: Path) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=12, **SIZES, **convolutions))


SOUND: dict[str, Callable[[Path], Any]] = {"ast": _ast, "clap": clap, "whisper": _whisper, "wav2vec2": _wav2vec2}


def save(make: Callable[[Path], Any], folder: Path) -> str:
    """Write a model and its tokenizer or feature extractor; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    make(folder).save_pretrained(folder)
    return str(folder)
