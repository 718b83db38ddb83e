"""Forward, dispatch: whether all ranks will take part in the backward."""


def check_gradients(needs_grad: list[bool]) -> None:
    """Raises ValueError if only some of the ranks would take part in the collectives of the backward.

    Args:
        needs_grad: of each rank, whether its hidden states or weights require a gradient.
    """
    ranks = {wanted: [rank for rank, needs in enumerate(needs_grad) if needs is wanted] for wanted in (True, False)}
    if ranks[True] and ranks[False]:
        raise ValueError(
            f"x or expert_weights must require a gradient on all ranks of process_group or on none: those of the ranks "
            f"{ranks[True]} do, those of the ranks {ranks[False]} do not, and the backward would wait for ever. A rank "
            "without tokens passes an empty tensor that requires a gradient like the others"
        )
