"""What the services say to each other, as plain frozen values.

Protobuf stops at each service's edge (`dspark.rpc.codec` translates); engines, scheduler and tests know only these.
Positions: `committed_len` N counts prompt and emitted tokens, the anchor included. The anchor sits at position N - 1,
K/V and features exist for positions 0 … N - 2, and the k-th draft token (k = 1 … block size) is for position N - 1 + k.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from dspark.errors import DSparkError


class Mode(enum.Enum):
    """How the target's distribution becomes tokens."""

    COUPLED = "coupled"
    REJECTION = "rejection"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings with every default filled in.

    The target's processed distribution is: logits / temperature, then top_k, then top_p over what is left
    (renormalised), then min_p relative to the most likely token, then renormalised. Ties keep the lower token id.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    mode: Mode = Mode.COUPLED
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether every choice is the most likely token; the mode then makes no difference."""
        return self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """Whether any filter is on."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its natural-log probability under the processed target distribution.

    At temperature 0, where that is a point mass, under the model's own: temperature 1, no filters.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token and the most likely alternatives, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SparseDistribution:
    """Everything a drafter could have proposed at one position; probabilities sum to 1."""

    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker is doing now; see `dspark.v1.WorkerLoad`."""

    running: int = 0
    waiting: int = 0
    tokens_in_flight: int = 0
    free_pages: int = 0
    total_pages: int = 0
    step_seconds: float = 0.0
    draining: bool = False
    observed_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served target: what must agree before a drafter or another verifier may serve its sequences."""

    name: str
    architecture: str
    model_fingerprint: str
    numerics_fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """A served drafter: its tap, the target it belongs to, and its shapes."""

    name: str
    architecture: str
    fingerprint: str
    tap_id: str
    model_fingerprint: str
    vocab_size: int
    draft_vocab_size: int
    block_size: int


@dataclass(frozen=True, slots=True)
class TapInfo:
    """A drafter's projection of target hidden states: RMSNorm(W_c [H^(l_1); …; H^(l_m)]) (DSpark §2.2)."""

    tap_id: str
    layer_ids: tuple[int, ...]
    target_hidden_size: int
    feature_size: int
    norm_eps: float
    target_vocab_size: int
    model_fingerprint: str = ""
    normalize_inputs: bool = False


@dataclass(frozen=True, slots=True)
class SequenceKey:
    """A sequence on a worker; the epoch grows whenever it moves or starts over."""

    sequence_id: str
    epoch: int


# ---------------------------------------------------------------- router ⇄ verifier


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Reserve pages for max_len tokens and take the committed ids so far."""

    key: SequenceKey
    token_ids: tuple[int, ...]
    sampling: Sampling
    max_len: int
    features: bool = True
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to OpenSequence: computed_len positions came from the prefix cache."""

    key: SequenceKey
    computed_len: int = 0
    error: DSparkError | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another token in place of the `place`-th draft (from 1), behind the drafts before that."""

    place: int
    token: int


@dataclass(frozen=True, slots=True)
class StepItem:
    """Compute `count` committed positions, then the drafts; a token is chosen once the anchor is reached.

    At most `keep` drafts are committed, however many are accepted: the token after them is then an accepted draft.
    With `hold_features` nobody drafts for the sequence, so features need not be computed yet. `alternatives`, by rising
    place and at most one a place, are verified beside the drafts: where the target disagrees with a draft it may agree
    with the other token there, and its choice behind that is known as well. Not in rejection mode, nor with `keep`.
    """

    key: SequenceKey
    committed_len: int
    count: int
    draft_tokens: tuple[int, ...] = ()
    draft_distributions: tuple[SparseDistribution, ...] = ()
    keep: int | None = None
    hold_features: bool = False
    alternatives: tuple[Alternative, ...] = ()

    @property
    def rows(self) -> int:
        """That the item takes in a step."""
        return self.count + len(self.draft_tokens) + len(self.alternatives)

    def committed(self, verdict: Verdict) -> tuple[int, ...]:
        """Tokens that a verdict on the item commits; none inside the prompt."""
        if verdict.token is None:
            return ()
        taken = verdict.accepted + 1 if verdict.turned else 0
        turned = (alternative.token for alternative in self.alternatives if alternative.place == taken)
        return (*self.draft_tokens[: verdict.accepted], *turned, verdict.token)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one StepItem came to: accepted drafts, then the next anchor; token is None inside the prompt.

    `matched` drafts were accepted before the item's `keep` cut them. `turned`: behind the accepted drafts comes the
    alternative for that place, and `token` behind it. `alternatives` were verified, the item's first ones: there may be
    no room for all.
    """

    key: SequenceKey
    committed_len: int
    computed_len: int = 0
    accepted: int = 0
    token: int | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    error: DSparkError | None = None
    matched: int = 0
    turned: bool = False
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Verdicts of one step, in the order of its items, and where its time went.

    The step had `other_tokens` more rows, of other callers, `other_prompt_tokens` of them inside prompts;
    `other_sequences` of theirs got `other_gained` tokens. A step of about as many rows in all costs `fixed_seconds` +
    rows · `marginal_seconds` (both 0 where the worker cannot say).
    """

    verdicts: tuple[Verdict, ...]
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    total_seconds: float = 0.0
    queue_seconds: float = 0.0
    fixed_seconds: float = 0.0
    marginal_seconds: float = 0.0
    other_tokens: int = 0
    other_prompt_tokens: int = 0
    other_sequences: int = 0
    other_gained: int = 0


# ---------------------------------------------------------------- router ⇄ draft


@dataclass(frozen=True, slots=True)
class AttachSequence:
    """Draft for this sequence; its features come from verifier_address."""

    key: SequenceKey
    verifier_address: str
    sampling: Sampling
    max_len: int
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Attached:
    """Answer to AttachSequence."""

    key: SequenceKey
    error: DSparkError | None = None


@dataclass(frozen=True, slots=True)
class ProposeItem:
    """Draft at most max_tokens after the anchor at position committed_len - 1.

    With `stay` as many are drafted again, unasked, behind whatever features come next, until the sequence is asked for
    anew. With `later` no block is wanted now, only those that come unasked; none without `stay`.
    """

    key: SequenceKey
    committed_len: int
    anchor: int
    max_tokens: int
    stay: bool = False
    later: bool = False


@dataclass(frozen=True, slots=True)
class Proposal:
    """One drafted block: the k-th token is for position committed_len - 1 + k.

    `confidences[k-1]` is c_k, the probability that token k survives given that all before it did (DSpark §3.1).
    `stays`: further blocks of this sequence will come unasked. `alternatives[k-1]` would have been drafted in place of
    token k, next to it: one for each token, or none at all.
    """

    key: SequenceKey
    committed_len: int
    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    distributions: tuple[SparseDistribution, ...] = ()
    error: DSparkError | None = None
    stays: bool = False
    alternatives: tuple[int, ...] = ()

    def cut(self, count: int) -> Proposal:
        """Its first `count` tokens, and what belongs to them."""
        return replace(
            self,
            tokens=self.tokens[:count],
            confidences=self.confidences[:count],
            distributions=self.distributions[:count],
            alternatives=self.alternatives[:count],
        )


@dataclass(frozen=True, slots=True)
class ProposeResult:
    """Proposals of one batch, in the order of its items, and where its time went.

    `other_requests` more were drafted for at the same time, for other callers; drafting for about as many in all costs
    `fixed_seconds` + requests · `marginal_seconds`, as in `StepResult`.
    """

    proposals: tuple[Proposal, ...]
    forward_seconds: float = 0.0
    total_seconds: float = 0.0
    feature_wait_seconds: float = 0.0
    queue_seconds: float = 0.0
    fixed_seconds: float = 0.0
    marginal_seconds: float = 0.0
    other_requests: int = 0


# ---------------------------------------------------------------- verifier ⇄ draft


@dataclass(frozen=True, slots=True)
class FeatureBlock:
    """Features of positions start … start + count - 1: bfloat16 little-endian bytes, shape (count, feature_size).

    `token_ids` are the committed ids of positions start + 1 … start + count, the one behind each feature; the last may
    be the anchor. Without a tap there are only they, and `data` is empty.
    """

    key: SequenceKey
    start: int
    count: int
    data: bytes = field(repr=False, default=b"")
    error: DSparkError | None = None
    token_ids: tuple[int, ...] = ()
