"""Which device of the catalogue to take for a job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from delest import errors, units
from delest.verbs.workplace import Workplace, check_batch

if TYPE_CHECKING:
    from delest.planning.devices import Offer
    from delest.records.devices import DeviceComparison
    from delest.records.hardware import Device
    from delest.records.plan import Choice
    from delest.records.trace import Trace
    from delest.training.progress import Progress


def read_prices(text: str) -> dict[str, float]:
    """`t4=0.35,l4=0.7`: what an hour of each costs. Raises `BadInput` with every fault."""
    prices, faults = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, amount = part.partition("=")
        try:
            prices[name.strip()] = float(amount)
        except ValueError:
            faults.append(f"--price {part!r} is no price: write a device and what an hour of it costs, as in t4=0.35.")
    if faults:
        raise errors.BadInput(faults)
    return prices


def offers_of(devices: str | Iterable[str], prices: Mapping[str, float] | None, memory: str | int | None) -> list[Offer]:
    """What is offered, each device once, in the order given. Raises `BadInput` with every unknown device and bad price."""
    from delest.hardware.catalogue import find_device

    names = devices.split(",") if isinstance(devices, str) else list(devices)
    faults: list[str] = []

    def find(name: str) -> Device | None:
        try:
            return find_device(name)
        except errors.BadInput as error:
            faults.extend(error.faults)
            return None

    found = {device.name: device for name in names if name.strip() and (device := find(name.strip())) is not None}
    if not found and not faults:
        faults.append("no device is named: give some of the catalogue, as in t4,l4,a100-80.")
    priced: dict[str, float] = {}
    for name, price in (prices or {}).items():
        if not isinstance(price, (int, float)) or isinstance(price, bool) or not 0 < price < math.inf:
            faults.append(f"a price of {price!r} for {name} is none: give what an hour costs, above zero.")
        elif (device := find(name)) is not None and device.name not in found:
            faults.append(
                f"the price of {name} belongs to none of the devices that are compared: {', '.join(found) or 'none'}."
            )
        elif device is not None:
            priced[device.name] = float(price)
    if faults:
        raise errors.BadInput(faults)
    return [_offer(device, priced.get(device.name), memory) for device in found.values()]


def _offer(device: Device, price: float | None, memory: str | int | None) -> Offer:
    from delest.footprint.estimate import choose_target
    from delest.planning.devices import Offer

    target = choose_target(device.name, None, None)
    runtime = target.runtime()
    budget = device.memory_bytes if memory is None else min(device.memory_bytes, units.read_size(memory, device.memory_bytes))
    return Offer(
        device=device,
        roofline=target.roofline(),
        runtime_bytes=runtime.idle_bytes + runtime.touched_bytes,
        budget_bytes=budget,
        price=price,
    )


def compare(place: Workplace, offers: list[Offer], *, seconds: float | None, exact: bool, say: Progress) -> DeviceComparison:
    """The devices for an opened job. Devices of one compute capability share a trace."""
    from delest.backends.torch.loops import JobLoop
    from delest.footprint.estimate import choose_target, trace_on
    from delest.planning.devices import Work, compare_devices
    from delest.records.plan import Plan
    from delest.verbs.memory import asked_for, example_of, watch

    check_batch(place)
    job, example = place.job, example_of(place, None)
    traces: dict[str, Trace] = {}

    def retrace(device: Device, choices: tuple[Choice, ...]) -> Trace:
        key = repr([device.capability, [(choice.method, choice.config) for choice in choices]])
        if key not in traces:
            say.stage(f"plan: tracing two steps for compute capability {device.capability}, {_words(choices)}")
            plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, choices=choices)
            traces[key] = trace_on(
                lambda mode: JobLoop(job, plan, place.source.schema, example),
                job.batch_size,
                choose_target(device.name, None, None),
                lambda: watch(place, 1, None),
                True,
            )[0]
        return traces[key]

    feed = place.feed("train")
    epochs = job.recipe.epochs_for(len(feed), feed.batch_size)
    work = Work(
        batch_size=job.batch_size,
        steps=epochs * feed.steps,
        epochs=epochs,
        validation_rows=len(place.splits["validation"]),
        base=asked_for(job),
        exact=exact,
    )
    return compare_devices(offers, work, retrace, within_seconds=seconds)


def _words(choices: tuple[Any, ...]) -> str:
    return "with " + ", ".join(choice.method for choice in choices) if choices else "plain"
