"""What the public operators demand of their arguments: errors that name the argument, what it was and what is needed."""

import torch


def check_tensors(**tensors):
    """Raise TypeError for what is no tensor, by its name."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} of type {type(tensor).__name__}: a tensor is needed")


def check(first, like, wanted):
    """Compare shape, dtype and device of every tensor with what goes with `like`, the argument `first`; wanted: {name: (tensor or None, shapes)}."""
    for name, (tensor, shapes) in wanted.items():
        if tensor is None:
            continue
        check_tensors(**{name: tensor})
        shapes = shapes if isinstance(shapes, list) else [shapes]
        if tuple(tensor.shape) not in shapes:
            needed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: {needed} is needed beside {first} of shape {tuple(like.shape)}")
        if not (tensor.is_floating_point() or tensor.is_complex() and name in ("A", "B", "C", "initial_state")):
            raise TypeError(f"{name} of dtype {tensor.dtype}: a floating dtype is needed")
        if tensor.device != like.device:
            raise ValueError(f"{name} on {tensor.device}: that of {first}, {like.device}, is needed")


def check_conv(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation):
    """Raise what causal_conv1d_fn says."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation={activation!r}: None, "silu" or "swish" is needed')
    check_tensors(x=x, weight=weight)
    if x.dim() != 3 or weight.dim() != 2 or not (x.shape[2] and weight.shape[1]):
        raise ValueError(f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)}: (batch, dim, length) and (dim, width) are needed, "
                         "with a length and a width of at least 1")
    (batch, dim, length), width = x.shape, weight.shape[1]
    states = (batch, dim, width - 1)
    check("x", x, dict(x=(x, tuple(x.shape)), weight=(weight, (dim, width)), bias=(bias, (dim,)), initial_states=(initial_states, states),
                       final_states_out=(final_states_out, states)))
    for name, tensor in dict(initial_states=initial_states, final_states_out=final_states_out).items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} of dtype {tensor.dtype}: that of x, {x.dtype}, is needed")
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out without return_final_states=True: it would not be written")
    if seq_idx is None:
        return
    check_tensors(seq_idx=seq_idx)
    if tuple(seq_idx.shape) != (batch, length) or seq_idx.is_floating_point():
        raise ValueError(f"seq_idx of shape {tuple(seq_idx.shape)}, {seq_idx.dtype}: integers (batch={batch}, length={length}) are needed")
    if initial_states is not None or return_final_states:
        raise NotImplementedError("seq_idx beside initial_states or return_final_states: states of several sequences in a row are not supported")


def check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Raise what selective_scan_fn says."""
    check_tensors(u=u, A=A, B=B, C=C)
    if u.dim() != 3 or A.dim() != 2 or not (u.shape[2] and A.shape[1]):
        raise ValueError(f"u of shape {tuple(u.shape)}, A of shape {tuple(A.shape)}: (batch, dim, length) and (dim, state) are needed, with a length "
                         "and a state of at least 1")
    for name, x in dict(B=B, C=C, initial_state=initial_state).items():
        if x is not None and x.is_complex() and not A.is_complex():
            raise TypeError(f"{name} of dtype {x.dtype}: a floating dtype is needed beside A of dtype {A.dtype}")
    (batch, dim, length), N = u.shape, A.shape[1]

    def coefficients(x):
        groups = x.shape[1] if x.dim() == 4 and x.shape[1] and dim % x.shape[1] == 0 else 1
        steps = 2 * length if A.is_complex() and not x.is_complex() else length
        return [(batch, N, steps), (batch, groups, N, steps), (dim, N)]
    whole = tuple(u.shape)
    check("u", u, dict(u=(u, whole), delta=(delta, whole), A=(A, (dim, N)), B=(B, coefficients(B)), C=(C, coefficients(C)), D=(D, (dim,)),
                       z=(z, whole), delta_bias=(delta_bias, (dim,)), initial_state=(initial_state, (batch, dim, N))))


def check_indices(name, indices, batch, device):
    """Raise TypeError or ValueError unless `indices` is one integer for each sequence."""
    check_tensors(**{name: indices})
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} of dtype {indices.dtype}: int32 or int64 is needed")
    if tuple(indices.shape) != (batch,) or indices.device != device:
        raise ValueError(f"{name} of shape {tuple(indices.shape)} on {indices.device}: {(batch,)} on {device} is needed")
