"""After any history, a load gives exact bytes or nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from disk_tier import MODEL, TIMEOUT_S, Clock, Tier, blob_files, named, wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_mlx.kv.tiers.record import Kind

MAX_BYTES = 1500
OTHER_MODEL = b"another model..."
names = st.integers(0, 11).map(lambda number: named(str(number)))
kinds = st.sampled_from(list(Kind))
models = st.sampled_from([MODEL, OTHER_MODEL])


def payload_of(model: bytes, kind: Kind, name: bytes) -> bytes:
    """The only content that a blob may ever have, of a length of its own."""
    return (model[:3] + bytes([kind]) + name) * (1 + name[0] % 7)


class Histories(RuleBasedStateMachine):
    """Two models, a folder that is too small for both, and somebody who damages files."""

    @initialize(key=st.sampled_from([None, b"k" * 32]))
    def begin(self, key: bytes | None) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.key = key
        self.tiers = {model: self.opened(model) for model in (MODEL, OTHER_MODEL)}

    def opened(self, model: bytes) -> Tier:
        tier = Tier(
            self.folder,
            fingerprint=model,
            max_bytes=MAX_BYTES,
            daily_write_bytes=None,
            min_free_bytes=0,
            key=self.key,
            clock=self.clock,
            max_queued_bytes=700,
        )
        wait_until(lambda: tier.is_ready)
        return tier

    @rule(model=models, kind=kinds, name=names, waits=st.booleans())
    def save(self, model: bytes, kind: Kind, name: bytes, waits: bool) -> None:
        tier, was_known = self.tiers[model], self.tiers[model].has(name, kind=kind)
        taken = tier.save(name, payload_of(model, kind, name), kind=kind)
        assert not (taken and was_known)
        if waits:
            assert tier.flush(TIMEOUT_S)

    @rule(model=models, kind=kinds, wanted=st.lists(names, max_size=6))
    def load(self, model: bytes, kind: Kind, wanted: list[bytes]) -> None:
        found = self.tiers[model].read(*wanted, kind=kind)
        assert found == {name: payload_of(model, kind, name) for name in found}
        assert set(found) <= set(wanted)

    @rule(model=models, kind=kinds, wanted=st.lists(names, max_size=6))
    def touch(self, model: bytes, kind: Kind, wanted: list[bytes]) -> None:
        self.tiers[model].touch(wanted, kind=kind)

    @rule(model=models, kind=kinds, name=names)
    def save_and_load(self, model: bytes, kind: Kind, name: bytes) -> None:
        tier = self.tiers[model]
        assert tier.flush(TIMEOUT_S)
        if tier.save(name, payload_of(model, kind, name), kind=kind):
            assert tier.flush(TIMEOUT_S)
            assert tier.read(name, kind=kind) == {name: payload_of(model, kind, name)}

    @rule(
        which=st.integers(0, 1000), where=st.integers(0, 1000), change=st.sampled_from(["flip", "cut", "add", "swap"])
    )
    def damage(self, which: int, where: int, change: str) -> None:
        files = [file for file in blob_files(self.folder) if file.stat().st_size]
        if not files:
            return
        file = files[which % len(files)]
        content = bytearray(file.read_bytes())
        if change == "flip":
            content[where % len(content)] ^= 1 << where % 8
        elif change == "cut":
            del content[where % len(content) :]
        elif change == "add":
            content.append(where % 256)
        else:
            content = bytearray(files[where % len(files)].read_bytes())
        temporary = file.with_suffix(".damaged")
        temporary.write_bytes(content)
        temporary.replace(file)

    @rule(model=models)
    def forget(self, model: bytes) -> None:
        tier = self.tiers[model]
        tier.forget()
        assert tier.flush(TIMEOUT_S)
        assert all(tier.read(*map(named, map(str, range(12))), kind=kind) == {} for kind in Kind)

    @rule(model=models, seconds=st.sampled_from([0, 30, 100_000]))
    def restart(self, model: bytes, seconds: int) -> None:
        self.clock.now += seconds
        self.tiers[model].close()
        self.tiers[model] = self.opened(model)

    @invariant()
    def sizes_are_sane(self) -> None:
        for tier in self.tiers.values():
            stats = tier.stats()
            assert 0 <= stats.size_bytes <= stats.folder_bytes
            assert stats.num_blobs > 0 or stats.size_bytes == 0  # a file may have been cut to nothing
            assert stats.problem is None

    def teardown(self) -> None:
        for tier in self.tiers.values():
            assert tier.flush(TIMEOUT_S)
            tier.close()
        final = self.opened(MODEL)
        wait_until(lambda: final.stats().folder_bytes <= MAX_BYTES)
        assert final.flush(TIMEOUT_S)
        final.close()
        assert sum(file.stat().st_size for file in blob_files(self.folder)) <= MAX_BYTES
        assert list(self.folder.rglob("*.tmp")) == []
        shutil.rmtree(self.folder)


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase
