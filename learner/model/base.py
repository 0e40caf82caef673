"""Loading of the frozen base model, and the digest that identifies it.

Nothing ever changes a base. Every version's manifest records the base's digest, and an adapter is only loaded onto the
base of that digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.compute_dtype import AUTO, choose_dtype
from perennial.learner.bases.frozen_weights import cast_layers_once
from perennial.learner.bases.quiet import quiet_transformers
from perennial.learner.bases.sources import (
    IDENTITY_FILES,
    SHIPPED_NAME,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    folder_of,
)
from perennial.learner.model.determinism import allow_deterministic_only

# A model without a position table (recurrent, ALiBi) states no limit; rows are cut to this then.
FALLBACK_POSITIONS = 2048


@dataclass(frozen=True)
class Base:
    """A base model that is ready for use and that nothing may change.

    Attributes:
        model: Causal language model, frozen and in evaluation mode.
        tokenizer: The model's own tokenizer.
        name: Name that it was loaded by; see `load_base`.
        digest: `sha256:<hex>` over weights, config and tokenizer files; see `digest_of_folder`.
        device: Device that the model computes on.
        dtype: Number format of the weights: bf16 on CUDA, fp32 on the CPU.
        max_positions: Longest row that the model takes, in tokens.
        compute_dtype: Number format that training and measurements compute in; None: bf16 on a GPU, fp32 on a CPU.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    device: torch.device
    dtype: torch.dtype
    max_positions: int
    compute_dtype: torch.dtype | None = None


def load_base(name: str = SHIPPED_NAME, device: str = "auto", threads: int | None = None, dtype: str = AUTO) -> Base:
    """Load a causal language model.

    Code from the model's repository is never run, and weights are read from safetensors alone. On the CPU, PyTorch is
    also set to use deterministic algorithms only.

    Args:
        name: `shipped`, a name of `perennial base ls`, a `.gguf` file, a folder, or a hub id (`owner/model`,
            `owner/model@revision`). A file is converted once, and a hub id downloaded once.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads of the process, 1 or more; None leaves the setting as it is.
        dtype: Number format of training and measurements: `fp32`, `bf16`, or `auto` for the faster one; see
            `choose_dtype`.

    Raises:
        BaseModelError: The name, the device, the thread count or the format is wrong, or the model cannot be used as a base.
    """
    torch_device = _pick_device(device)
    if threads is not None:
        if threads < 1:
            raise BaseModelError("Bad thread count", got=threads, allowed="1 or more", remedy="set 1 or more threads")
        torch.set_num_threads(threads)
    if torch_device.type == "cpu":
        allow_deterministic_only()
    stored = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    choose_dtype(dtype, torch_device, 0)  # a wrong name is reported before anything is loaded
    folder = folder_of(name)
    digest = digest_of_folder(folder)
    with quiet_transformers():
        model, tokenizer = _load(folder, stored)
    model.requires_grad_(False).eval().to(torch_device)
    _check_tokenizer(model, tokenizer, folder)
    _check_causal(model, folder)
    compute = choose_dtype(dtype, torch_device, sum(parameter.numel() for parameter in model.parameters()))
    if torch_device.type == "cpu":
        cast_layers_once(model)
    return Base(model, tokenizer, name, digest, torch_device, stored, _max_positions(model), compute)


def digest_of_folder(folder: Path) -> str:
    """Return `sha256:<hex>` over name, size and content of a model folder's identity files, sorted by name.

    Only files that decide the logits count (weights, config, tokenizer), so a readme changes nothing.

    Raises:
        BaseModelError: Weights are missing or incomplete.
    """
    total = hashlib.sha256()
    for path in sorted({*_weight_files(folder), *(folder / name for name in IDENTITY_FILES)}):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name}\0{path.stat().st_size}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, with the index that lists them where they are split into parts."""
    index = folder / WEIGHTS_INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        raise BaseModelError(
            "No weights in the model folder",
            got=str(folder),
            allowed=f"{WEIGHTS_FILE}, or {WEIGHTS_INDEX_FILE} with its parts",
            remedy="save the model with save_pretrained(), which writes safetensors",
        )
    shards = set(json.loads(index.read_bytes())["weight_map"].values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise BaseModelError("Weights are incomplete", got=missing, remedy=f"copy the missing parts to {folder}")
    return [index, *(folder / shard for shard in shards)]


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BaseModelError(
            "Unknown device", got=device, allowed="auto, cpu, cuda, cuda:N", remedy="set the device to auto"
        )
    torch_device = torch.device(device)
    if torch_device.type == "cuda" and (torch_device.index or 0) >= torch.cuda.device_count():
        raise BaseModelError(
            "No such CUDA device",
            got=device,
            allowed=f"{torch.cuda.device_count()} CUDA devices are visible",
            remedy="set the device to auto or cpu",
        )
    return torch_device


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model and its tokenizer, with every parameter read from the folder."""
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            "The folder holds an adapter, not a base",
            got=str(folder),
            allowed="a folder with a whole model",
            remedy="merge the adapter into its base and save that with save_pretrained()",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BaseModelError(
                "Not a causal language model",
                got=f"model_type {config.model_type} in {folder}",
                allowed="what AutoModelForCausalLM loads",
                remedy=f"choose a decoder-only model, or set `{SHIPPED_NAME}`",
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise BaseModelError(
            "The model cannot be loaded",
            got=f"{folder}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            allowed="config, tokenizer and safetensors weights as save_pretrained() writes them, without custom code",
            remedy=f"save the model and its tokenizer again, or set `{SHIPPED_NAME}`",
        ) from error
    if info["missing_keys"]:
        raise BaseModelError(
            "The weights lack parameters of the causal language model",
            got=sorted(info["missing_keys"])[:5],
            allowed="weights for every parameter",
            remedy="choose a checkpoint that was saved with its language-model head",
        )
    return model, tokenizer


def _check_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "The tokenizer has no end-of-sequence token",
            got=str(folder),
            allowed="a tokenizer with eos_token",
            remedy="set eos_token in tokenizer_config.json to the token that ends a text",
        )
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise BaseModelError(
            "The tokenizer has more tokens than the model",
            got=len(tokenizer),
            allowed=f"at most {embeddings}",
            remedy="put the tokenizer that belongs to the model into its folder",
        )


def _check_causal(model: Any, folder: Path) -> None:
    """Raise BaseModelError if a later token changes earlier logits.

    An encoder loads as a causal model too, and would then see the token that it should predict.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=model.device).remainder(embeddings).expand(2, 8).clone()  # (B, T)
    ids[1, -1] = embeddings - 1
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (T - 1, V) each
    if not torch.allclose(first, second, rtol=0.05, atol=0.05):
        raise BaseModelError(
            "Not a causal language model: a later token changes earlier predictions",
            got=f"{type(model).__name__} in {folder}",
            allowed="a decoder-only model",
            remedy=f"choose a decoder-only model, or set `{SHIPPED_NAME}`",
        )


def _max_positions(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else FALLBACK_POSITIONS
