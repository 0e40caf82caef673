"""Groups of settings of the model: the base, the recipe of an update, the gate. See `loading` for how they are set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perennial.streams.settings.groups import PositiveFloat, PositiveInt, SettingsGroup, Share


class ModelSettings(SettingsGroup):
    """The base model and where it runs."""

    base: str = Field(
        "shipped",
        description="base model: `shipped`, `smollm2`, a folder, a .gguf file, or an id on the Hugging Face hub",
    )
    general_texts: str = Field(
        "",
        description="file of JSON lines with texts that the base must go on to know: `text`, or `prompt` and `response`; "
        "empty: a sample of the base, and for the shipped base docstrings",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the model; auto: a CUDA GPU if there is one"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="number format of training and measurements, part of the recipe; auto: bf16 on a GPU, on a CPU with "
        "units for it (AMX, AVX-512) for bases of 50 million parameters or more, and otherwise fp32",
    )
    threads: PositiveInt = Field(
        2,
        description="CPU threads of the model; every manifest names them, for they change the last bits of a result",
    )
    max_tokens: PositiveInt = Field(
        256, description="scorer: tokens at the start of an example on which its losses are measured"
    )
    score_batch: PositiveInt = Field(32, description="scorer: examples per forward pass")
    lanes: PositiveInt = Field(
        3,
        description="learner: jobs that may run at once beside updates; a second one starts where the first takes long",
    )
    pass_adapters: PositiveInt = Field(
        16,
        le=1024,
        description="learner: most adapters that train in one pass; each has a thread while its update runs",
    )
    pass_wait_ms: int = Field(
        50,
        ge=0,
        le=60_000,
        description="learner: longest time that a pass waits for adapters whose updates are about to train",
    )


class TrainingSettings(SettingsGroup):
    """The recipe of an update. Part of every manifest."""

    rank: PositiveInt = Field(16, description="rank of the LoRA matrices")
    alpha: PositiveInt = Field(32, description="alpha of LoRA: its output is scaled by alpha / rank")
    learning_rate: PositiveFloat = Field(3e-3, description="learning rate of AdamW")
    steps: PositiveInt = Field(
        3, description="least number of optimizer steps per update; there are more if the new rows need them"
    )
    epochs: PositiveInt = Field(
        1, le=100, description="least number of times that an update trains each of its new rows; see `steps`"
    )
    rows: PositiveInt = Field(12, description="rows per optimizer step")
    row_tokens: PositiveInt = Field(128, description="largest number of tokens per row")
    replay_share: Share = Field(0.5, description="share of training rows that come from earlier examples, from 0 to 1")
    general_share: Share = Field(
        0.2, description="share of training rows that come from the base's own kind of text, from 0 to 1"
    )
    general_kl_weight: float = Field(
        3.0,
        ge=0,
        description="weight, per token, of the divergence (KL) of the adapter's predictions from the base's on the general "
        "rows, beside the loss of the other rows; 0: general rows are trained as text",
    )
    question_dropout: Share = Field(
        0.0,
        description="share of the tokens of each question, from 0 to 1, that a training step leaves out at random, so that "
        "the answer is learned for other wordings too",
    )
    replay_size: PositiveInt = Field(1_024, description="earlier examples that each adapter keeps for replay")
    replay_bytes: int = Field(
        0,
        ge=0,
        description="bytes of text from which on an adapter keeps no further example for replay; the one that reaches them is "
        "whole; 0: any number",
    )
    replay_places: Literal["examples", "documents"] = Field(
        "documents",
        description="who has a place among the earlier examples for replay: `documents`, so that one that supersedes others takes "
        "their place as soon as it is learned, or `examples`, each by itself, until the others are forgotten",
    )
    clip_norm: PositiveFloat = Field(
        1.0, description="largest norm of the gradient; a larger gradient is scaled down to it"
    )
    packed_tokens: int = Field(
        0,
        ge=0,
        description="most tokens of a forward pass of training, in which rows lie one behind the other without padding; 0: "
        "rows are padded to the longest",
    )
    correction_passes: int = Field(
        32,
        ge=0,
        le=100,
        description="most further passes of an update over corrections whose answers the model would not give yet, each as far "
        "as the general loss allows; 0: corrections are trained as often as documents",
    )
    correction_check_steps: PositiveInt = Field(
        1,
        description="least steps of further passes over corrections between two looks at what is learned and at the general "
        "loss, in whole passes; with a large base and few corrections, looking takes as long as training",
    )
    rehearse_update: bool = Field(
        False,
        description="replay examples of the update itself, too, in its further passes over corrections, so that what is learned "
        "already is not pushed out; false: only those of earlier updates",
    )
    correction_votes: Literal["off", "update", "history"] = Field(
        "update",
        description="who decides between corrections that answer the same question differently, one vote for each source, a "
        "tie for the newest: the corrections of the `update`, or those of the `history` in the replay buffer as well, so "
        "that one source cannot take back what several taught; `off`: all are trained",
    )
    slow_average: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="share of the average of the trained weights that an update keeps; the average is what is served, and "
        "the next update trains from the trained weights; 0: the trained weights are served",
    )
    merge_share: Share = Field(
        0.5,
        description="share of the tokens of a document, from 0 to 1, from which it is merged into another document of its "
        "update that has them, too, and is trained only on the others; 0: every document is trained in full",
    )
    seed: int = Field(0, description="seed of all random choices in training")
    shared_passes: bool = Field(
        True, description="train in packed passes, which several adapters share; false: one adapter at a time, padded"
    )


class GateSettings(SettingsGroup):
    """The measurements that a version must pass before it is promoted. Part of every manifest."""

    held_out_share: Share = Field(
        0.2,
        description="share of a micro-batch, from 0 to 1, that is held out: measured first, and trained on after that",
    )
    anchor_rows: PositiveInt = Field(
        12, description="rows of general text on which the gate measures each update; other rows each time"
    )
    gentler_tries: int = Field(
        2,
        ge=0,
        le=8,
        description="how often an update that the gate refused is tried again, each time at a lower learning rate and with "
        "more general text, before its examples are set aside",
    )
    max_general_rise_nats: PositiveFloat = Field(
        0.15,
        description="largest rise of the general loss above the base's, in nats per token; the gate refuses a rise past it",
    )
    max_answer_rise_nats: float = Field(
        0.0,
        ge=0,
        description="largest rise of the loss on the base's own answers to fixed questions, in nats per token; with it "
        "the gate also asks some of them; 0: answers are not looked at",
    )
    min_gain_nats: float = Field(
        0.0,
        description="least fall of the held-out loss, in nats per token; the gate allows for noise of three standard errors",
    )
    max_noise_nats: float = Field(
        0.5,
        ge=0,
        description="largest rise of the held-out loss that the gate takes for noise, in nats per token; 0: any rise within "
        "three standard errors",
    )
