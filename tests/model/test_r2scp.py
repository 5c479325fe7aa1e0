"""The whole model: its inputs, what trains, what a missing modality changes, and that it learns."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2scp.jobs.training.stages import ExpertsObjective, MixingObjective
from r2scp.model.batch import AUDIO, TEXT, VISUAL, Batch, Neighbours, map_tensors
from r2scp.model.losses import LossConfig
from r2scp.model.r2scp import R2SCP, ModelConfig, Stage

C = 12
CONFIG = ModelConfig(encoder_dim=C, classes=5, dim=16, heads=2, dropout=0.0, k=2)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def first(real: Tensor, length: int) -> Tensor:
    """Mask with the first `real` places True."""
    return torch.arange(length) < real[..., None]


def neighbours(rows: int, has_neighbours: Tensor | None = None) -> Neighbours:
    """Four neighbours a row, of up to 7 s."""
    mask_BNL = first(torch.randint(3, 8, (rows, 4)), 7)
    if has_neighbours is not None:
        mask_BNL = mask_BNL & has_neighbours[:, None, None]
    return Neighbours(unit(rows, 4, 7, C), mask_BNL, torch.arange(rows * 4).view(rows, 4))


def make(rows: int = 6, seed: int = 0, *, choices: bool = False) -> Batch:
    """Random complete rows of unlike lengths."""
    torch.manual_seed(seed)
    choices_mask_BK = torch.ones(rows, 4, dtype=torch.bool)
    choices_mask_BK[0, 3] = False
    return Batch(
        audio_BLC=unit(rows, 6, C),
        audio_mask_BL=first(torch.randint(3, 7, (rows,)), 6),
        visual_BLC=unit(rows, 5, C),
        visual_mask_BL=first(torch.randint(3, 6, (rows,)), 5),
        words_BWC=unit(rows, 4, C),
        words_mask_BW=first(torch.randint(2, 5, (rows,)), 4),
        sentence_BC=unit(rows, C),
        present_BM=torch.ones(rows, 2, dtype=torch.bool),
        retrieved=neighbours(rows),
        farthest=neighbours(rows),
        choices_BKC=unit(rows, 4, C) if choices else None,
        choices_mask_BK=choices_mask_BK if choices else None,
        target_B=torch.randint(0, 3, (rows,)),
    )


def model(stage: Stage = Stage.MIXING, **changes: object) -> R2SCP:
    torch.manual_seed(1)
    return R2SCP(replace(CONFIG, **changes)).set_stage(stage).eval()  # pyright: ignore[reportArgumentType]


SWITCHES = list(product([True, False], [True, False]))  # CMR, CAP


@pytest.mark.parametrize("fusion", ["concat", "sum_pooled"])
@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
@pytest.mark.parametrize(("cmr", "cap"), SWITCHES)
@torch.no_grad()
def test_an_absent_modality_never_enters(cmr: bool, cap: bool, missing: int, fusion: str) -> None:
    net = model(cmr=cmr, cap=cap, fusion=fusion)
    batch = make().drop(missing)
    clean = net(batch)
    name = ("audio_BLC", "visual_BLC")[missing]
    poisoned = net(replace(batch, **{name: torch.full_like(getattr(batch, name), math.nan)}))
    assert torch.equal(clean.logits_BK, poisoned.logits_BK)
    assert torch.isfinite(clean.logits_BK).all()
    recovers = cmr or cap
    assert clean.evidence.available_BM[:, missing].tolist() == [recovers] * 6
    if not recovers:
        assert (clean.evidence.router_BS[:, missing] == 0).all()
        torch.testing.assert_close(clean.evidence.router_BS.sum(dim=1), torch.ones(6))


def test_an_absent_modality_leaves_no_trace_in_the_gradients() -> None:
    net, batch = ExpertsObjective(model(Stage.EXPERTS)), make().drop(VISUAL, torch.arange(6) < 3)
    batch.visual_BLC[:3] = math.nan
    net(batch).loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_question_alone_is_answered_by_text() -> None:
    answer = model()(make().drop(AUDIO).drop(VISUAL))
    assert answer.evidence.router_BS[:, TEXT].tolist() == [1.0] * 6
    assert torch.equal(answer.logits_BK, answer.joint_BK)


@pytest.mark.parametrize("missing", [None, AUDIO, VISUAL])
@torch.no_grad()
def test_padding_changes_nothing(missing: int | None) -> None:
    def longer(x: Tensor, by: int) -> Tensor:
        return F.pad(x, (0, 0, 0, by), value=math.nan)

    def more(part: Neighbours | None) -> Neighbours:
        assert part is not None
        return Neighbours(longer(part.tokens_BNLC, 3), F.pad(part.mask_BNL, (0, 3)), part.ids_BN)

    batch = make()
    padded = replace(
        batch,
        audio_BLC=longer(batch.audio_BLC, 5),
        audio_mask_BL=F.pad(batch.audio_mask_BL, (0, 5)),
        visual_BLC=longer(batch.visual_BLC, 1),
        visual_mask_BL=F.pad(batch.visual_mask_BL, (0, 1)),
        words_BWC=longer(batch.words_BWC, 2),
        words_mask_BW=F.pad(batch.words_mask_BW, (0, 2)),
        retrieved=more(batch.retrieved),
        farthest=more(batch.farthest),
    )
    if missing is not None:
        batch, padded = batch.drop(missing), padded.drop(missing)
    net = model(purify_full=True)
    torch.testing.assert_close(net(padded).logits_BK, net(batch).logits_BK, rtol=0, atol=1e-6)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    def cut(value: object) -> object:
        if isinstance(value, Neighbours):
            return Neighbours(*(part[rows] for part in value))
        return value[rows] if isinstance(value, Tensor) else value

    names = batch.__slots__
    return Batch(**{name: cut(getattr(batch, name)) for name in names})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("purify_full", [False, True])
@pytest.mark.parametrize(("cmr", "cap"), SWITCHES)
@torch.no_grad()
def test_rows_that_miss_different_things_share_a_batch(cmr: bool, cap: bool, purify_full: bool) -> None:
    """Each row answers as it does alone; rows: complete, no audio, no visual, neither, no bank hit twice."""
    batch = make()
    has_neighbours_B = torch.tensor([True, True, True, True, False, False])
    batch = replace(batch, retrieved=neighbours(6, has_neighbours_B))
    batch = batch.drop(AUDIO, torch.tensor([False, True, False, True, True, False]))
    batch = batch.drop(VISUAL, torch.tensor([False, False, True, True, False, True]))
    net = model(cmr=cmr, cap=cap, purify_full=purify_full)
    together = net(batch)
    for row in range(6):
        alone = net(rows_of(batch, [row]))
        torch.testing.assert_close(together.logits_BK[row], alone.logits_BK[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.evidence.router_BS[row], alone.evidence.router_BS[0])
    recovers = cmr or cap
    assert together.evidence.recovered_BM.tolist() == [
        [False, False],
        [recovers, False],
        [False, recovers],
        [False, False],
        [recovers, False],
        [False, recovers],
    ]
    assert together.evidence.fallback_BM.any(dim=1).tolist() == [False] * 4 + [cmr] * 2
    assert (together.evidence.purified[AUDIO] is not None) is cap


@torch.no_grad()
def test_cap_without_cmr_is_cmr_whose_bank_is_empty() -> None:
    batch = replace(make(), retrieved=neighbours(6, torch.zeros(6, dtype=torch.bool))).drop(AUDIO)
    torch.testing.assert_close(model(cmr=False)(batch).logits_BK, model()(batch).logits_BK)


@torch.no_grad()
def test_negatives_that_were_not_found_fall_back_too() -> None:
    empty = neighbours(6, torch.zeros(6, dtype=torch.bool))
    step = MixingObjective(model(cap=False), LossConfig(rank="paper"))(replace(make(), farthest=empty), AUDIO)
    near = MixingObjective(model(cmr=False, cap=True, k=0), LossConfig(rank="paper"))(make(), AUDIO)
    # unpurified common features on both sides: one is R⁻ here, the other R⁺ there
    assert step.incomplete is not None
    assert near.incomplete is not None
    target_B = make().target_B
    assert target_B is not None
    parts = [
        F.cross_entropy(part.logits_BK, target_B, reduction="none")
        for part in (step.incomplete, near.incomplete)
    ]
    torch.testing.assert_close(step.loss.parts["rank_negative"], (parts[0] - parts[1]).relu().mean())


@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
@torch.no_grad()
def test_common_features_are_the_available_ones_through_the_missing_expert(missing: int) -> None:
    """Algorithm 1, line 14: H_com = E_m(Φ_u(F_u)), and H_miss is that when there is no retrieval."""
    net, batch, name = model(cmr=False, k=0), make().drop(missing), ("visual", "audio")[missing]
    expected = net.experts(*batch.sequence(name), source=1 - missing, expert=missing)
    encoded = net.encode(batch)
    common = encoded.common[missing]
    assert common is not None
    assert encoded.common[1 - missing] is None
    assert torch.equal(common.states_BLD, expected.states_BLD)
    put_in = replace(
        encoded, present_BM=torch.ones(6, 2, dtype=torch.bool), **{("audio", "visual")[missing]: expected}
    )
    torch.testing.assert_close(net.answer(put_in).logits_BK, net(batch).logits_BK)


@torch.no_grad()
def test_mixed_precision_gives_float32_logits_close_to_full() -> None:
    net, batch = model(), make().drop(AUDIO)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = net(batch)
    assert coarse.logits_BK.dtype == torch.float32
    torch.testing.assert_close(coarse.logits_BK, net(batch).logits_BK, rtol=0, atol=0.3)


@torch.no_grad()
def test_only_the_n_nearest_are_used() -> None:
    batch = make().drop(AUDIO)
    near = batch.retrieved
    assert near is not None
    poisoned_BNLC = near.tokens_BNLC.clone()
    poisoned_BNLC[:, 3] = math.nan
    other = replace(batch, retrieved=near._replace(tokens_BNLC=poisoned_BNLC))
    answer = model()(batch)
    assert torch.equal(answer.logits_BK, model()(other).logits_BK)
    assert not torch.equal(answer.logits_BK, model(neighbours=2)(batch).logits_BK)
    assert answer.evidence.neighbours_BN is not None
    assert torch.equal(answer.evidence.neighbours_BN, near.ids_BN[:, :3])


@torch.no_grad()
def test_evidence_names_what_was_purged_and_injected() -> None:
    answer = model()(make().drop(AUDIO))
    purified = answer.evidence.purified[AUDIO]
    assert purified is not None
    assert answer.evidence.purified[VISUAL] is None
    assert purified.noise_BL.sum(dim=1).tolist() == [CONFIG.k] * 6
    assert torch.equal(purified.noise_BL, purified.source_BL >= 0)
    for row in range(6):
        kept_L = ~purified.noise_BL[row] & ~purified.dissonance_BL[row].isnan()
        assert (
            purified.dissonance_BL[row][purified.noise_BL[row]].min()
            >= purified.dissonance_BL[row][kept_L].max()
        )
        chosen = purified.saliency_BU[row].nan_to_num(-1).topk(CONFIG.k).indices
        assert set(purified.source_BL[row][purified.noise_BL[row]].tolist()) == set(chosen.tolist())


@torch.no_grad()
def test_nothing_is_retrieved_or_purified_when_both_are_present() -> None:
    batch = make()
    batch_alone = replace(batch, retrieved=None, farthest=None)
    answer = model()(batch)
    assert torch.equal(answer.logits_BK, model()(batch_alone).logits_BK)
    assert answer.evidence.purified == (None, None)
    assert answer.evidence.neighbours_BN is not None
    assert (answer.evidence.neighbours_BN == -1).all()
    full = model(purify_full=True)(batch)
    assert all(part is not None and part.noise_BL.sum() == 12 for part in full.evidence.purified)
    assert not torch.allclose(full.logits_BK, answer.logits_BK)


TRAINED = {
    Stage.EXPERTS: {"experts", "decoders"},
    Stage.MIXING: {"purifier", "router", "decoders"},
}


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
@pytest.mark.parametrize("stage", list(Stage))
def test_gradients_reach_every_trainable_parameter_and_no_other(
    stage: Stage, missing: int, choices: bool
) -> None:
    net, batch = model(classes=None if choices else 5), make(choices=choices)
    step = ExpertsObjective(net)(batch) if stage is Stage.EXPERTS else MixingObjective(net)(batch, missing)
    step.loss.total.backward()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    reached = {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == reached
    assert {name.split(".")[0] for name in trained} == TRAINED[stage]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("cap_gradient", ["straight_through", "none"])
@pytest.mark.parametrize(("cmr", "cap"), SWITCHES)
def test_what_trains_is_what_is_used(cmr: bool, cap: bool, cap_gradient: str, freeze: bool) -> None:
    """No trainable parameter stays without gradient, whatever is switched off: else DDP would stop."""
    net = model(cmr=cmr, cap=cap, cap_gradient=cap_gradient, freeze_experts=freeze)
    MixingObjective(net)(make(), VISUAL).loss.total.backward()
    idle = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert any(name.startswith("purifier") for name, p in net.named_parameters() if p.requires_grad) is cap
    assert net.purifier.projection_DD.requires_grad is (cap and cap_gradient == "straight_through")
    assert any(p.requires_grad for p in net.experts.parameters()) is not freeze


def test_frozen_experts_do_not_move_and_do_not_drop_out() -> None:
    net = model(dropout=0.5).train()
    assert not net.experts.training
    assert net.decoders.training
    before = {name: p.clone() for name, p in net.named_parameters()}
    objective = MixingObjective(net)
    # also under an optimiser that was given everything and decays weights
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for missing in (AUDIO, VISUAL):
        optimiser.zero_grad()
        objective(make(), missing).loss.total.backward()
        optimiser.step()
    moved = {name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"purifier", "router", "decoders"}
    batch = make()
    assert torch.equal(net.encode(batch).audio.states_BLD, net.encode(batch).audio.states_BLD)


def test_stage_one_weighs_evenly_and_neither_recovers_nor_purifies() -> None:
    answer = model(Stage.EXPERTS)(make().drop(AUDIO))
    assert (answer.evidence.router_BS == torch.tensor([0, 1 / 2, 1 / 2])).all()
    assert not answer.evidence.recovered_BM.any()
    assert answer.evidence.purified == (None, None)


@pytest.mark.parametrize("missing", [AUDIO, VISUAL])
@torch.no_grad()
def test_stage_two_compares_the_three_passes(missing: int) -> None:
    """One encoding answered three times is the model called three times."""
    net, batch = model(), make()
    step = MixingObjective(net)(batch, missing)
    real = net(batch).logits_BK
    near = net(batch.drop(missing)).logits_BK
    far = net(replace(batch, retrieved=batch.farthest).drop(missing)).logits_BK
    assert step.incomplete is not None
    torch.testing.assert_close(step.full.logits_BK, real)
    torch.testing.assert_close(step.incomplete.logits_BK, near)
    assert batch.target_B is not None
    losses = [F.cross_entropy(part, batch.target_B, reduction="none") for part in (real, near, far)]
    rank = (losses[0] - losses[1]).relu().mean() + (losses[1] - losses[2]).relu().mean()
    torch.testing.assert_close(step.loss.total, losses[0].mean() + losses[1].mean() + rank)


@pytest.mark.parametrize(
    ("cmr", "cap", "missing", "choices"),
    [
        (True, True, AUDIO, False),
        (True, False, VISUAL, True),
        (False, True, VISUAL, False),
        (False, False, AUDIO, True),
    ],
)
def test_stage_two_learns_the_same_from_an_encoding(
    cmr: bool, cap: bool, missing: int, choices: bool
) -> None:
    net, batch = model(cmr=cmr, cap=cap, classes=None if choices else 5), make(choices=choices)
    objective = MixingObjective(net)
    with torch.no_grad():
        encoded = net.encode(batch, missing if net.config.recovers else None)
    assert len(encoded) == len(batch) == 6
    gradients = []
    for inputs in (batch, encoded):
        net.zero_grad()
        step = objective(inputs, missing)
        step.loss.total.backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert step.loss.parts.keys() == objective(batch, missing).loss.parts.keys()
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    for invalid in (
        replace(encoded, target_B=None),
        replace(encoded.drop(AUDIO)),
        replace(batch, target_B=None),
    ):
        with pytest.raises(ValueError, match=r"must hold target_B|every row must have audio and visual"):
            objective(invalid, missing)


@pytest.mark.parametrize("inputs", ["batch", "encoded"])
def test_rows_without_a_known_answer_are_answered_and_not_learned(inputs: str) -> None:
    net, batch = model(), make()
    target_B = torch.tensor([1, -1, 0, 2, -1, 3])
    open_batch = replace(batch, target_B=target_B)
    training_inputs = open_batch if inputs == "batch" else net.encode(open_batch, AUDIO)
    assert torch.equal(net(open_batch).logits_BK, net(batch).logits_BK)
    with pytest.raises(ValueError, match=r"not known \(-1\) must be left out"):
        MixingObjective(net)(training_inputs, AUDIO)
    with pytest.raises(ValueError, match=r"not known \(-1\) must be left out"):
        ExpertsObjective(model(Stage.EXPERTS))(open_batch)
    replace(make(choices=True), target_B=target_B)  # one of these choices is masked, and none is meant


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [tensor for name in getattr(value, "__slots__", ()) for tensor in tensors(getattr(value, name))]


def test_every_tensor_moves() -> None:
    net, batch = model(purify_full=True), make(choices=True)
    batch = batch.drop(VISUAL, torch.arange(6) < 2)
    encoded = net.encode(batch)
    assert len(tensors(batch)) == 17
    assert len(tensors(encoded)) == 21
    assert {tensor.device.type for tensor in tensors(encoded.to("meta"))} == {"meta"}
    for source in (batch, encoded, replace(encoded, common=(None, encoded.common[1]), retrieved=None)):
        copy = map_tensors(source, Tensor.clone)
        assert type(copy) is type(source)
        for one, two in zip(tensors(source), tensors(copy), strict=True):
            assert torch.equal(one, two)
            assert one.data_ptr() != two.data_ptr()
        for name in source.__slots__:
            assert type(getattr(copy, name)) is type(getattr(source, name))
    torch.testing.assert_close(net.answer(map_tensors(encoded, Tensor.clone)).logits_BK, net(batch).logits_BK)
    assert torch.equal(net(batch.to("cpu")).logits_BK, net(batch).logits_BK)


@pytest.mark.gpu
def test_pinned_memory_reaches_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    net, batch = model(), make(choices=True)
    for source in (batch, net.encode(batch)):
        pinned = source.pin_memory()
        assert all(tensor.is_pinned() for tensor in tensors(pinned))
        moved = pinned.to("cuda", non_blocking=True)
        assert all(tensor.is_cuda for tensor in tensors(moved))
        for one, two in zip(tensors(source), tensors(moved), strict=True):
            assert torch.equal(one, two.cpu())


@torch.no_grad()
def test_the_baseline_without_recovery_comes_in_two_forms() -> None:
    net, batch = model(cmr=False, cap=False), make()
    plain = MixingObjective(net, LossConfig(modality_dropout=False))(batch, AUDIO)
    dropped = MixingObjective(net, LossConfig(modality_dropout=True))(batch, AUDIO)
    assert set(plain.loss.parts) == {"real"}
    assert plain.incomplete is None
    assert set(dropped.loss.parts) == {"real", "lacking"}
    assert dropped.incomplete is not None
    assert (dropped.incomplete.evidence.router_BS[:, AUDIO] == 0).all()


@torch.no_grad()
def test_cap_alone_has_no_negatives_and_cmr_without_a_bank_says_so() -> None:
    step = MixingObjective(model(cmr=False))(make(), AUDIO)
    assert set(step.loss.parts) == {"real", "lacking", "rank_positive"}
    with pytest.raises(ValueError, match="must hold neighbours"):
        model()(replace(make(), retrieved=None).drop(AUDIO))
    with pytest.raises(ValueError, match="every row must have audio and visual"):
        MixingObjective(model())(make().drop(AUDIO, torch.arange(6) < 1), VISUAL)


def test_a_model_is_the_same_after_a_round_trip() -> None:
    net, other = model(), R2SCP(CONFIG).set_stage(Stage.MIXING).eval()
    other.load_state_dict(net.state_dict(), strict=True)
    batch = make().drop(VISUAL)
    assert torch.equal(net(batch).logits_BK, other(batch).logits_BK)


def test_half_precision_features_are_welcome() -> None:
    batch = make().drop(AUDIO)
    halved = replace(batch, visual_BLC=batch.visual_BLC.half(), words_BWC=batch.words_BWC.half())
    torch.testing.assert_close(model()(halved).logits_BK, model()(batch).logits_BK, rtol=0, atol=5e-3)


def test_a_batch_refuses_what_cannot_be_answered() -> None:
    batch = make(choices=True)
    silent_BW = batch.words_mask_BW.clone()
    silent_BW[2] = False
    with pytest.raises(ValueError, match=r"at least one word.*rows \[2\]"):
        replace(batch, words_mask_BW=silent_BW)
    with pytest.raises(ValueError, match="mark it absent"):
        replace(batch, audio_mask_BL=torch.zeros_like(batch.audio_mask_BL))
    with pytest.raises(ValueError, match="choices that are not masked"):
        replace(batch, target_B=torch.full((6,), 3))
    with pytest.raises(ValueError, match="visual features must be"):
        replace(batch, visual_BLC=batch.visual_BLC[..., :-1])
    with pytest.raises(ValueError, match="only audio"):
        batch.drop(TEXT)


def test_settings_that_cannot_be() -> None:
    for wrong in (
        {"dim": 15},
        {"heads": 5},
        {"saliency": "loud"},
        {"k": -1},
        {"dropout": 1.0},
        {"classes": 1},
    ):
        with pytest.raises(ValueError, match="must be"):
            replace(CONFIG, **wrong)
    paper = ModelConfig()
    assert (paper.neighbours, paper.k, paper.dim, paper.layers, paper.heads, paper.classes) == (
        3,
        5,
        768,
        1,
        8,
        42,
    )
    assert paper.sizes.ffn == 768


@pytest.mark.parametrize("choices", [False, True])
def test_the_model_learns_32_random_questions_by_heart(choices: bool) -> None:
    torch.manual_seed(0)
    net = R2SCP(replace(CONFIG, dim=32, classes=None if choices else 5))
    batch = make(32, choices=choices)
    assert batch.target_B is not None
    for objective, steps in ((ExpertsObjective(net), 15), (MixingObjective(net), 30)):
        net.train()
        optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for step in range(steps):
            optimiser.zero_grad()
            taken = (
                objective(batch) if isinstance(objective, ExpertsObjective) else objective(batch, step % 2)
            )
            taken.loss.total.backward()
            optimiser.step()
    net.eval()
    for condition in (batch, batch.drop(AUDIO), batch.drop(VISUAL)):
        assert torch.equal(net(condition).logits_BK.argmax(dim=1), batch.target_B)
