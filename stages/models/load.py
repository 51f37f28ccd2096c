"""Loading and saving checkpoints: Hugging Face folders, GGUF files, and random weights from a config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.data.chat import stop_ids
from stages.errors import InputError
from stages.models.tokenizers import ensure_pad_token, word_tokenizer
from stages.specs.common import Dtype

INIT_FILE = "init.yaml"
# A bar for every checkpoint of a pipeline hides what a person looks for.
transformers.utils.logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer. `stops` are the tokens that end a completion, the tokenizer's EOS first."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def context(self) -> int:
        """The longest sequence that the model's positions allow."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)


class LoadedPolicy(LoadedModel):
    """A causal language model."""


def load_policy(folder: Path, dtype: Dtype = "float32", seed: int = 0) -> LoadedPolicy:
    """Load a model folder on the CPU, dropout and cache settings as its config says.

    `seed` is used for random weights only. Raises InputError for a folder that holds no model.
    """
    model: Any
    if is_classifier(folder):
        raise InputError(f"{folder.name}: a reward model (a sequence classifier), where a language model is needed")
    if (folder / INIT_FILE).is_file():
        model, tokenizer = _random(folder / INIT_FILE, seed)
    elif gguf := next(iter(sorted(folder.glob("*.gguf"))), None):
        model, tokenizer = _from_gguf(folder, gguf.name)
    elif (folder / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder.name}: no model there (no config.json, *.gguf or {INIT_FILE}; found {found})")
    ensure_pad_token(tokenizer, model)
    generation_eos = getattr(model.generation_config, "eos_token_id", None)
    model.to(dtype=DTYPES[dtype])
    return LoadedPolicy(model, tokenizer, tuple(stop_ids(tokenizer, generation_eos)))


def require_same_tokens(policy: LoadedModel, **others: LoadedModel) -> None:
    """Raise InputError, naming it, for a model that reads other tokens than the policy writes."""
    for name, other in others.items():
        if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise InputError(
                f"the {name}'s tokenizer differs from the policy's, so it would read other tokens than were sampled; "
                f"train the {name} from a model of the policy's family"
            )


def save_policy(policy: LoadedPolicy, folder: Path) -> None:
    """Write a checkpoint that `AutoModelForCausalLM` loads."""
    if policy.model.generation_config is not None:
        stops = list(policy.stops)
        policy.model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    save_checkpoint(policy.model, policy.tokenizer, folder)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that plain transformers loads. The same weights give the same bytes: no paths, no times."""
    model.config._name_or_path = ""
    model.config.use_cache = True
    for mark in ("is_local", "local_files_only"):  # where the tokenizer came from
        tokenizer.init_kwargs.pop(mark, None)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def is_classifier(folder: Path) -> bool:
    """Whether a model's folder says that it holds a sequence classifier: a reward model."""
    config = folder / "config.json"
    names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return any(str(name).endswith("ForSequenceClassification") for name in names or ())


def _random(path: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    spec: dict[str, Any] = yaml.safe_load(path.read_text())
    try:
        words, fields = spec["tokenizer"], dict(spec["model"])
        tokenizer = word_tokenizer(words["task"], words["chat_template"], words.get("control_tokens", []))
        family = fields.pop("model_type")
    except KeyError as error:
        raise InputError(f"{path.name}: the key {error} is missing; see configs/models/ for an example") from error
    config = AutoConfig.for_model(
        family,
        **fields,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def _from_gguf(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model loaded from GGUF is dequantised already, but still carries the marks of a quantised one, which block saving.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)
