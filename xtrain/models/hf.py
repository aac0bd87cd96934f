"""Models of the transformers library: `model.hf` names one, or a folder with its config or its weights too.

torch and transformers are imported when a source is made, not before. docs/models.md says what is done
to a model here.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xtrain.errors import RequestError, XtrainError, described, is_about_memory
from xtrain.models.hf_folder import CONFIG, folder_problems, has_weights, local_folder
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    from torch import nn

NOT_IN_TRAINING = ("classifier", "summary")
"""Dropouts of heads that a language model does not have."""
PLACES = ("_name_or_path", "auto_map", "transformers_version")
"""What of a config tells where it came from and who wrote it, not what the model is."""
READ_WHOLE = (
    "model.hf: each process reads the whole model: weights are read one by one only from a folder that has "
    "each of them once, under the model's own name for it"
)


class HuggingFaceSource:
    """A causal language model, with stored weights, or its own initial ones under `train.seed`.

    RequestError says why there is no such model, or why it does not fit the data. `resumed`: a checkpoint's
    weights will replace them, so that no stored ones are needed.
    """

    def __init__(self, spec: Spec, data_vocab_size: int, resumed: bool = False) -> None:
        self.spec = spec
        folder = local_folder(spec.model.hf or "")
        if folder is not None and (problem := next(folder_problems(folder), None)):
            raise RequestError(str(problem))
        self.folder = folder
        self.path = str(folder or spec.model.hf)
        self.has_weights = not resumed and (folder is None or has_weights(folder))
        weights = "a checkpoint's" if resumed else "stored" if self.has_weights else "initial"
        self.transformers = _library(self.path)
        self.notes: list[str] = []
        self.outline: nn.Module | str | None = None
        with self._trying("used"):
            self.config = self._read_config()
            self.text = self.config.get_text_config()
            self._set_vocabulary(data_vocab_size)
            self._check_context()
            self.config_elsewhere = copy.deepcopy(self.config)
            """For other programs: with its own dropouts, and generating from kept values."""
            self.dropout_note = set_dropouts(self.text, spec.model.dropout)
            self.config.use_cache = self.text.use_cache = (
                False  # keys and values are kept for generation only
            )
            self.shape = (int(self.text.num_hidden_layers), int(self.text.hidden_size))
            self.description = (
                f"{spec.model.hf}, {self.text.num_hidden_layers} layers x {self.text.hidden_size}, "
                f"vocabulary {self.text.vocab_size}, {weights} weights"
            )

    @property
    def content_hash(self) -> str:
        """Of the config, wherever it lies."""
        content = json.dumps(_without_places(self.config.to_dict()), sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """The config: a checkpoint of the model is then a folder that the library loads."""
        return {CONFIG: self.config_of("float32").to_json_string().encode()}

    def config_of(self, dtype: str) -> Any:
        """For other programs that find the weights in this dtype; after `build`."""
        config = copy.deepcopy(self.config_elsewhere)
        config.dtype = dtype
        return config

    def build(self) -> nn.Module:
        with self._trying("built"):
            return self._finished(self._load() if self.has_weights else self._initialise())

    def build_gradually(self) -> nn.Module:
        """Stored weights are read one by one, where the folder has them as the model names them."""
        from xtrain.models.hf_weights import copy_weights

        with self._trying("built"):
            model = self._initialise()
            if not self.has_weights or (self.folder is not None and copy_weights(model, self.folder)):
                return self._finished(model)
            del model
            finished = self._finished(self._load())
            self.notes.append(READ_WHOLE)
            return finished

    def _finished(self, model: nn.Module) -> nn.Module:
        """As an engine is to have it, once it is seen to be a causal model."""
        from xtrain.models.anatomy import is_causal
        from xtrain.models.hf_activations import NOTE, fuse_activations
        from xtrain.models.outline import outline

        if not is_causal(model):
            raise RequestError(
                f"model.hf {self.path}: its logits for a token change with the tokens after it; "
                "expected a causal language model"
            )
        self.notes = [self.dropout_note] if self.dropout_note else []
        if fuse_activations(model):
            self.notes.append(NOTE)
        self._note_padding(model)
        self._note_blocks(model)
        self.config_elsewhere.architectures = [type(model).__name__]
        adapted = self._adapted(model).train()
        self.outline = outline(adapted)
        return adapted

    def skeleton(self) -> nn.Module:
        """As `build` makes it of shapes alone: a head that is an nn.Linear is taken to be understood."""
        from xtrain.models.adapter import HeadLoss, LogitsLoss, LossHead
        from xtrain.models.hf_activations import fuse_activations

        origin = f"model.hf {self.spec.model.hf}"
        model: Any = self._initialise()
        fuse_activations(model)
        linear = model.get_output_embeddings()
        path = next((path for path, module in model.named_modules() if module is linear), None)
        if path is None or model.base_model is model:
            return LogitsLoss(model, origin).train()
        model.set_submodule(path, LossHead(linear, "auto"))
        return HeadLoss(model, path, origin).train()

    def _adapted(self, model: nn.Module) -> nn.Module:
        """With the loss taken in its head, or where that is not understood, of its own logits."""
        from xtrain.models.adapter import HeadLoss, LogitsLoss, LossHead
        from xtrain.models.anatomy import UnknownHead, find_head

        origin = f"model.hf {self.spec.model.hf}"
        chunk = self.spec.techniques.loss_chunk
        try:
            head = find_head(model)
        except UnknownHead as unknown:
            self._note_whole_logits(str(unknown))
            return LogitsLoss(model, origin)
        linear: Any = model.get_submodule(head.path)
        model.set_submodule(head.path, LossHead(linear, chunk, head.form))
        return HeadLoss(model, head.path, origin)

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2

    def _read_config(self) -> Any:
        trust = self.spec.model.trust_remote_code
        with self._trying("found"):
            config = self.transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=trust)
        if getattr(config, "quantization_config", None) is not None:
            raise RequestError(
                f"model.hf {self.path}: its weights are quantised; expected weights of full precision: "
                "use the model that it was made from"
            )
        return config

    def _initialise(self) -> nn.Module:
        """The model's own initial weights, drawn on the CPU in fp32."""
        import torch

        torch.manual_seed(self.spec.train.seed)
        model: nn.Module = self.transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(self.config),
            dtype=torch.float32,
            trust_remote_code=self.spec.model.trust_remote_code,
        )
        return model.float()

    def _load(self) -> nn.Module:
        """The stored weights as fp32; each parameter of the model must have one."""
        import torch

        torch.manual_seed(self.spec.train.seed)
        model: nn.Module
        model, loaded = self.transformers.AutoModelForCausalLM.from_pretrained(
            self.path,
            config=copy.deepcopy(self.config),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=self.spec.model.trust_remote_code,
            output_loading_info=True,
        )
        if missing := sorted(loaded["missing_keys"]):
            raise RequestError(
                f"model.hf {self.path}: its files have no weights for {_some(missing)}; expected the whole "
                "model, or a folder with config.json alone to train from the start"
            )
        return model.float()

    def _set_vocabulary(self, data_vocab_size: int) -> None:
        given, own = self.spec.model.vocab_size, self.text.vocab_size
        if given is not None and given != own:
            if self.has_weights:
                raise RequestError(
                    f"model.vocab_size: found {given}, expected {own}, that of the stored weights of "
                    f"{self.path}; leave it out"
                )
            self.text.vocab_size = given
            if (self.text.pad_token_id or 0) >= given:
                self.text.pad_token_id = None
        if data_vocab_size > self.text.vocab_size:
            nearest = (
                f"use the model's own tokenizer (data.tokenizer: {self.path})"
                if self.has_weights
                else f"set model.vocab_size to {data_vocab_size} or more"
            )
            raise RequestError(
                f"model.hf {self.path} has a vocabulary of {self.text.vocab_size}, but the data has "
                f"{data_vocab_size} symbols; {nearest}"
            )

    def _check_context(self) -> None:
        longest = getattr(self.text, "max_position_embeddings", None)
        seq_len = self.spec.data.seq_len
        if isinstance(longest, int) and seq_len > longest:
            raise RequestError(
                f"data.seq_len: found {seq_len}, expected at most the max_position_embeddings of {self.path} "
                f"({longest}); nearest: {longest}"
            )

    def _note_padding(self, model: Any) -> None:
        symbol = getattr(model.get_input_embeddings(), "padding_idx", None)
        if symbol is not None:
            self.notes.append(
                f"model.hf: symbol {symbol} is the model's padding (pad_token_id): as an input its "
                "embedding is not trained"
            )

    def _note_blocks(self, model: nn.Module) -> None:
        from xtrain.models.blocks import find_blocks

        try:
            find_blocks(model, self.spec.model.blocks)
        except RequestError:
            self.notes.append(
                "model.hf: its blocks cannot be found; memory.checkpointing and layers over devices need "
                "their path in model.blocks"
            )

    def _note_whole_logits(self, why: str) -> None:
        """The loss of the model's own logits; refused where the spec asks for chunks of a certain size."""
        chunk = self.spec.techniques.loss_chunk
        if isinstance(chunk, int):
            raise RequestError(
                f"memory.loss_chunk: found {chunk}, but the loss of model.hf {self.path} "
                f"cannot be taken by chunks: {why}; use auto"
            )
        self.notes.append(f"model.hf: its logits are made as a whole, not by chunks: {why}")

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Whatever the library raises is about the model that was named."""
        try:
            yield
        except XtrainError:
            raise
        except Exception as error:  # OSError, ValueError, and errors of its own and of its parts
            if is_about_memory(error):  # a full device is the engine's to tell
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            if not isinstance(error, (OSError, ValueError)):
                reason = described(error).splitlines()[0]
            raise RequestError(
                f"model.hf {self.path} could not be {what}: {reason}. Expected a folder with config.json "
                "(and safetensors), or the name of a model that is in the local cache or can be fetched"
            ) from error


def _without_places(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without_places(value) for key, value in content.items() if key not in PLACES}


def set_dropouts(config: Any, dropout: float) -> str:
    """Give all dropouts of a config one value, and 0 to those that leave out whole layers.

    Returns what was changed, a sentence for people; empty when it was so already.
    """
    values = {
        key: value
        for key, value in config.to_dict().items()
        if "drop" in key and isinstance(value, (int, float)) and not key.startswith(NOT_IN_TRAINING)
    }
    wanted = {key: 0.0 if "layer" in key else dropout for key in values}
    if dropout and dropout not in wanted.values():
        raise RequestError(
            f"model.dropout: found {dropout:g}, but the config of this model ({config.model_type}) has no "
            "dropout; leave it out"
        )
    changed = [key for key in values if values[key] != wanted[key]]
    for key in changed:
        setattr(config, key, wanted[key])
    told = ", ".join(f"{key} {wanted[key]:g} (was {values[key]:g})" for key in changed)
    return f"model.hf: dropouts of the config are set as model.dropout says: {told}" if told else ""


def _library(path: str) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as missing:
        raise RequestError(
            f"model.hf {path} needs the transformers library: `pip install xtrain[hf]`, or use model.preset"
        ) from missing
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
