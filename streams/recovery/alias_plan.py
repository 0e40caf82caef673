"""Decide how an alias of a restored store goes on. Pure."""

from __future__ import annotations

from perennial.storage.registry.registry import AliasState

WAITS = "restored; served again once the requests to forget since the backup are carried out"
RESUMED = "restored from a backup"


def resumed_alias(
    state: AliasState,
    newest: tuple[int, str] | None,
    announced: int,
    announced_version: str | None,
    *,
    holds_erased: bool,
) -> AliasState:
    """Return an alias as it is to be after a restore; the same one where nothing was announced since.

    Subscribers apply only generations above the one that they serve, so the alias takes the next one above all that were
    announced. An alias whose version learned what was erased since is retired, at the highest generation that was
    announced and not above it: a subscriber that starts now serves nothing, one that runs goes on with the version that
    was made without the erased text, and both take the rebuilt version, which has the next generation.

    Args:
        state: The alias as the store had it.
        newest: Sequence number and id of the newest version that may be served; None where there is none.
        announced: The highest generation of the alias that was ever announced; 0 for none.
        announced_version: The version that it was announced with; None where that is not known.
        holds_erased: Whether the version learned an example that a request to forget selects which is not carried out.
    """
    if newest is not None and newest[0] > state.seq:  # a learner had made it and not moved the alias yet
        state = state.model_copy(
            update={"seq": newest[0], "version": newest[1], "kind": "promoted", "previous_version": state.version,
                    "generation": state.generation + 1}
        )  # fmt: skip
    if holds_erased:
        highest = max(announced, state.generation)
        return state.model_copy(update={"generation": highest, "kind": "retired", "reason": WAITS})
    if announced < state.generation or (announced == state.generation and announced_version in {None, state.version}):
        return state
    return state.model_copy(update={"generation": announced + 1, "reason": f"{RESUMED}: {state.reason}"[:1000]})
