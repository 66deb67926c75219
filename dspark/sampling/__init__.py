"""How distributions become tokens: the target's processed distribution, exact keyed choices, and the drafter's choice.

`processed` turns rows of target logits into laws, `choice` draws from them, `logprobs` reports them, `draft` is the
drafter's side. Acceptance of drafts is left to the verifier (`services.verifier.verification`).
"""

from dspark.sampling.draft import Choice, DraftChooser

__all__ = ["Choice", "DraftChooser"]
