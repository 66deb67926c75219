"""Requests through a real router over gRPC, against toy workers: what clients get."""

import asyncio
import dataclasses
import re
from typing import Any

import grpc
import prometheus_client
import pytest
from support.toys import (
    BOS,
    EOS,
    MODEL,
    ToyDraft,
    ToyVerifier,
    by_fives,
    cluster,
    expected,
    ids_of,
    letters,
    scripted,
    until,
)

from dspark.v1 import generation_pb2
from services.router.metrics import PHASES

PROMPT = [BOS, *ids_of("hello")]


async def test_tokens_are_the_targets_with_drafts_accepted_and_rejected() -> None:
    async with cluster() as toys:
        result = await toys.generate("hello", max_tokens=50)
    assert result.ids == expected(letters, PROMPT, 5, 50)
    counts = result.finished.speculation
    assert counts.enabled
    assert counts.drafter == "toy-drafter"
    assert 0 < counts.accepted < counts.verified
    assert counts.rounds + counts.accepted >= 49
    assert counts.rounds < 45
    assert sum(counts.accepted_at) == counts.accepted
    assert all(a <= v for a, v in zip(counts.accepted_at, counts.verified_at, strict=True))
    assert result.started.prompt_tokens == 6
    assert result.finished.usage.completion_tokens == 50


@pytest.mark.parametrize("drafters", [0, 1, 2])
@pytest.mark.parametrize("verify_length", [1, 7])
async def test_drafters_and_lengths_change_no_token(drafters: int, verify_length: int) -> None:
    workers = [ToyVerifier(), *(ToyDraft(f"draft-{i}") for i in range(drafters))]
    async with cluster(*workers, options=by_fives(verify_length=verify_length)) as toys:
        results = await asyncio.gather(
            *(toys.generate("hello", max_tokens=40, sampling={"seed": seed}) for seed in range(16))
        )
    for seed, result in enumerate(results):
        assert result.ids == expected(letters, PROMPT, seed, 40)
        assert bool(result.finished.speculation.accepted) == bool(drafters)
        assert (result.finished.speculation.drafter == "") == (drafters == 0)
        if not drafters:
            assert result.finished.speculation.missed_rounds > 0


async def test_one_two_and_three_runs_agree_across_two_routers_and_two_workers_of_each_kind() -> None:
    verifiers, drafters = [ToyVerifier("v0"), ToyVerifier("v1")], [ToyDraft("d0"), ToyDraft("d1")]
    async with cluster(*verifiers, *drafters, routers=2) as toys:
        results = await asyncio.gather(
            *(toys.generate("hello", router=i % 2, max_tokens=30, sampling={"seed": i}) for i in range(16))
        )
        assert all(len(worker.steps) > 0 for worker in verifiers)
        assert all(worker.proposals > 0 for worker in drafters)
    for seed, result in enumerate(results):
        assert result.ids == expected(letters, PROMPT, seed, 30)


async def test_an_unset_seed_is_drawn_and_reported() -> None:
    async with cluster() as toys:
        first = await toys.generate("hello", max_tokens=20, sampling={"seed": None})
        second = await toys.generate("hello", max_tokens=20, sampling={"seed": None})
        again = await toys.generate("hello", max_tokens=20, sampling={"seed": first.started.seed})
    assert first.started.seed != second.started.seed
    assert first.ids == again.ids == expected(letters, PROMPT, first.started.seed, 20)


async def test_rejection_mode_ships_distributions_and_mixes_with_coupled_requests() -> None:
    async with cluster() as toys:
        results = await asyncio.gather(
            *(toys.generate("hello", max_tokens=20, sampling={"mode": 1 + i % 2, "seed": i}) for i in range(6))
        )
    for seed, result in enumerate(results):
        assert result.ids == expected(letters, PROMPT, seed, 20)
        assert result.finished.speculation.accepted > 0


async def test_speculation_can_be_off_or_capped_for_a_request() -> None:
    verifier, drafter = ToyVerifier(), ToyDraft()
    async with cluster(verifier, drafter) as toys:
        off = await toys.generate("hello", max_tokens=10, speculation=2)
        assert not drafter.attached
        assert not drafter.proposals
        assert not verifier.opened[0].features
        capped = await toys.generate("hello", max_tokens=20, max_verify_length=2)
        none = await toys.generate("hello", max_tokens=10, max_verify_length=0)
    assert off.finished.speculation.enabled is False
    assert off.finished.speculation.missed_rounds == off.finished.speculation.verified == 0
    assert max(len(item.draft_tokens) for step in verifier.steps for item in step) == 2
    assert capped.finished.speculation.verified > 0
    assert none.finished.speculation.drafted == none.finished.speculation.missed_rounds == 0


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, 5),
        ({"policy": ""}, 5),
        ({"policy": "none"}, 0),
        ({"policy": "fixed:0"}, 0),
        ({"policy": "fixed:2"}, 2),
        ({"policy": "fixed:99"}, 7),  # what the drafter has
        ({"policy": "fixed:3", "max_verify_length": 1}, 1),
        ({"policy": "fixed:1", "max_verify_length": 3}, 1),
        ({"policy": "fixed:3", "speculation": 2}, 0),
    ],
)
async def test_a_request_chooses_its_policy(fields: dict[str, Any], longest: int) -> None:
    verifier = ToyVerifier()
    async with cluster(verifier, ToyDraft()) as toys:
        result = await toys.generate("hello", max_tokens=40, **fields)
    assert result.ids == expected(letters, PROMPT, 5, 40)
    assert max(len(item.draft_tokens) for step in verifier.steps for item in step) == longest
    assert result.finished.speculation.enabled == (fields.get("policy") != "none" and "speculation" not in fields)


async def test_verify_length_zero_decodes_plainly() -> None:
    drafter = ToyDraft()
    async with cluster(ToyVerifier(), drafter, options=by_fives(verify_length=0)) as toys:
        result = await toys.generate("hello", max_tokens=10)
    assert result.ids == expected(letters, PROMPT, 5, 10)
    assert result.finished.speculation.rounds == 9
    assert not drafter.proposals


async def test_logprobs_come_one_per_token() -> None:
    async with cluster() as toys:
        result = await toys.generate("hello", max_tokens=17, sampling={"logprobs": 0})
        plain = await toys.generate("hello", max_tokens=17)
    assert [entry.chosen.token_id for entry in result.logprobs] == result.ids
    assert not plain.logprobs


# ---------------------------------------------------------------- how requests end


@pytest.mark.parametrize("ignore", [False, True])
async def test_end_of_sequence_ends_unless_ignored(ignore: bool) -> None:
    rule = scripted(len(PROMPT), [*ids_of("abc"), EOS, *ids_of("def")])
    async with cluster(ToyVerifier(rule=rule), ToyDraft(rule=rule)) as toys:
        result = await toys.generate("hello", max_tokens=9, ignore_eos=ignore)
    assert result.ids == [*ids_of("abc"), EOS, *(ids_of("def..") if ignore else ())]
    assert result.text == ("abcdef.." if ignore else "abc")
    assert result.finished.reason == (2 if ignore else 1)


async def test_stop_ids_end_and_their_text_is_cut() -> None:
    rule = scripted(len(PROMPT), ids_of("abcdef"))
    async with cluster(ToyVerifier(rule=rule), ToyDraft(rule=rule, spoil=lambda _: False)) as toys:
        result = await toys.generate("hello", max_tokens=20, stop_token_ids=ids_of("d"))
    assert result.ids == ids_of("abcd")
    assert (result.text, result.finished.reason) == ("abc", 1)
    assert result.finished.speculation.accepted >= 3  # counted before truncation


@pytest.mark.parametrize("good", [False, True])
async def test_stop_strings_are_found_across_deltas_and_never_shown_in_part(good: bool) -> None:
    rule = scripted(len(PROMPT), ids_of("one, two, three and four"))
    drafter = ToyDraft(rule=rule, spoil=lambda _: not good)
    async with cluster(ToyVerifier(rule=rule), drafter) as toys:
        result = await toys.generate("hello", max_tokens=40, stop=["zebra", "three and"])
    assert result.text == "one, two, "
    assert result.finished.stop_match == "three and"
    assert result.finished.reason == 1
    assert result.ids == ids_of("one, two, three and")
    assert result.finished.usage.completion_tokens == len(result.ids)
    assert "".join(result.texts).count("t") == 1  # not even its first letter


async def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    rule = scripted(len(PROMPT), ids_of("to thr"))
    async with cluster(ToyVerifier(rule=rule), ToyDraft(rule=rule)) as toys:
        result = await toys.generate("hello", max_tokens=6, stop=["three"])
    assert (result.text, result.finished.reason, result.finished.stop_match) == ("to thr", 2, "")


async def test_no_delta_has_half_a_character() -> None:
    text = "né 👩‍👩‍👧 ünd 世界 ok."
    rule = scripted(len(PROMPT), ids_of(text))
    async with cluster(ToyVerifier(rule=rule), ToyDraft(rule=rule)) as toys:
        result = await toys.generate("hello", max_tokens=len(ids_of(text)))
    assert result.text == text
    assert not any("�" in piece for piece in result.texts)
    assert len(result.texts) > 3


@pytest.mark.parametrize("stop", [[], ["zebra"]])
async def test_a_whole_answer_is_the_same_in_one_piece(stop: list[str]) -> None:
    async with cluster() as toys:
        asked: dict[str, Any] = {"max_tokens": 50, "stop": stop, "sampling": {"logprobs": 1}}
        streamed, whole = [await toys.generate("hello", whole=whole, **asked) for whole in (False, True)]
    assert len(streamed.texts) > 10
    assert len(whole.texts) == 1
    assert (whole.ids, whole.text, whole.logprobs) == (streamed.ids, streamed.text, streamed.logprobs)
    assert whole.finished.timings.first_token_seconds < whole.finished.timings.total_seconds


async def test_a_whole_answer_comes_in_portions_where_it_is_longer_than_a_client_may_be_behind() -> None:
    async with cluster(stream_buffer=64) as toys:
        result = await toys.generate("hello", max_tokens=300, whole=True)
    assert result.ids == expected(letters, PROMPT, 5, 300)
    assert 3 <= len(result.texts) <= 5


async def test_a_whole_answer_ends_at_its_stop_string() -> None:
    rule = scripted(len(PROMPT), ids_of("one, two, three and four"))
    async with cluster(ToyVerifier(rule=rule), ToyDraft(rule=rule)) as toys:
        result = await toys.generate("hello", max_tokens=40, stop=["three"], whole=True)
    assert (result.text, result.finished.stop_match, result.finished.reason) == ("one, two, ", "three", 1)
    assert result.ids == ids_of("one, two, three")


async def test_chat_uses_the_models_template() -> None:
    async with cluster() as toys:
        chat = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="hello")])
        call = toys.stub().Generate(generation_pb2.GenerateRequest(chat=chat, max_tokens=3))
        events = [event async for event in call]
    assert events[0].started.prompt_tokens == len([BOS, *ids_of("u hello.a ")])


async def test_tokenize_and_describe() -> None:
    async with cluster() as toys:
        told = await toys.stub().Tokenize(generation_pb2.TokenizeRequest(text="ab", model="toy"))
        bare = await toys.stub().Tokenize(generation_pb2.TokenizeRequest(text="ab", no_special_tokens=True))
        about = await toys.stub().Describe(generation_pb2.DescribeRequest())
        loads = await toys.stub().GetLoads(generation_pb2.GetLoadsRequest())
    assert list(told.token_ids) == [BOS, *bare.token_ids]
    assert list(told.pieces) == ["<bos>", "a", "b"]
    assert (about.model.name, about.drafter, about.verify_length) == ("toy", "toy-drafter", 16)
    assert about.policy == "fixed:5"
    assert {worker.role for worker in loads.workers} == {"draft", "verify"}
    assert loads.queue_limit == 64


# ---------------------------------------------------------------- long prompts


async def test_running_streams_go_on_while_a_long_prompt_is_computed() -> None:
    verifier = ToyVerifier(row_seconds=0.00002)
    async with cluster(verifier, ToyDraft(), options=by_fives(prefill_tokens=256)) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=200))
        await until(lambda: len(verifier.steps) > 5)
        long = await toys.generate([BOS, *ids_of("a" * 3999)], max_tokens=4)
        short = await running
    assert short.ids == expected(letters, PROMPT, 5, 200)
    assert long.ids == expected(letters, [BOS, *ids_of("a" * 3999)], 5, 4)
    pieces = [[item.count for item in step] for step in verifier.steps if any(item.count > 1 for item in step)]
    beside = [counts for counts in pieces if 1 in counts]
    assert len(beside) >= 14  # every piece ran beside the running stream
    assert max(max(counts) for counts in beside) == 256


async def test_prompts_share_a_step_and_alone_take_all_of_it() -> None:
    verifier = ToyVerifier(max_step_tokens=128)
    verifier.hang = True  # until all three are there
    async with cluster(verifier) as toys:
        prompts = [[BOS, *ids_of("b" * length)] for length in (399, 499, 599)]
        running = asyncio.gather(*(toys.generate(prompt, max_tokens=3) for prompt in prompts))
        await until(lambda: len(toys.engine.verifiers.links["verify-0"].opening) == 3)
        verifier.hang = False
        results = await running
    for prompt, result in zip(prompts, results, strict=True):
        assert result.ids == expected(letters, prompt, 5, 3)
    rows = [sum(item.count + len(item.draft_tokens) for item in step) for step in verifier.steps]
    assert max(rows) == 128
    shared = next(step for step in verifier.steps if sum(item.count > 1 for item in step) == 3)
    assert sorted(item.count for item in shared) == [42, 43, 43]


# ---------------------------------------------------------------- several models, and what operators see


async def test_two_models_are_served_by_name() -> None:
    other = dataclasses.replace(MODEL, name="other", model_fingerprint="other", numerics_fingerprint="other")
    shout = scripted(len(PROMPT), ids_of("!!!!!!!!"))
    async with cluster(ToyVerifier("v0"), ToyVerifier("v1", model=other, rule=shout), ToyDraft()) as toys:
        first = await toys.generate("hello", max_tokens=8, model="toy")
        second = await toys.generate("hello", max_tokens=8, model="other")
        with pytest.raises(grpc.aio.AioRpcError, match="model is empty, and there are several"):
            await toys.generate("hello", max_tokens=8)
    assert first.ids == expected(letters, PROMPT, 5, 8)
    assert second.text == "!!!!!!!!"
    assert second.finished.speculation.drafter == ""  # the drafter is the other target's


async def test_metrics_tell_what_was_done_and_where_the_time_went() -> None:
    async with cluster() as toys:
        results = [await toys.generate("hello", max_tokens=20, sampling={"seed": seed}) for seed in range(3)]
        await asyncio.sleep(0.3)
        shown = prometheus_client.generate_latest(toys.engine.metrics.registry).decode()
    value = {name: float(number) for name, number in re.findall(r"^(dspark_\S+) (\S+)$", shown, re.MULTILINE)}
    counts = [result.finished.speculation for result in results]
    assert value["dspark_generation_tokens_total"] == 60
    assert value["dspark_router_rounds_total"] == sum(c.rounds for c in counts)
    assert value["dspark_spec_decode_num_draft_tokens_total"] == sum(c.verified for c in counts)
    assert value["dspark_spec_decode_num_accepted_tokens_total"] == sum(c.accepted for c in counts)
    assert value['dspark_request_success_total{finished_reason="length"}'] == 3
    assert value['dspark_router_workers{role="draft"}'] == 1
    assert value["dspark_num_requests_running"] == value["dspark_num_requests_waiting"] == 0
    phases = [value[f'dspark_router_phase_seconds_total{{phase="{phase}"}}'] for phase in PHASES]
    assert all(phases)
    engine = value['dspark_router_engine_seconds_total{part="verify_total"}']
    assert 0 < engine < value["dspark_router_runnable_seconds_total"]
