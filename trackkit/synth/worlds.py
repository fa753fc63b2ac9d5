"""Worlds: what is in a procedural video, where everything moves, and the labels that follow from
it.

`World` decides; `trackkit.synth.scenes.Scene` draws it; `trackkit.synth` has the dials and the data
sets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trackkit.synth.bodies import RIGID, SKELETONS, Body, Part
from trackkit.synth.textures import (
    BANK_SIZES,
    OUTLINE,
    SPRITE,
    Draw,
    Floats,
    Ints,
    Shape,
    background,
    circle,
    pack,
    shape,
    sine,
    spline,
    texture,
)

SLOW, QUICK = 8, 3  # frames between the control points of smooth and of jerky motion
POINTS = 300  # points that measure how much of the target is visible
PIECE = 97  # where the piece of a texture that a sprite wears may begin, in texels


def _swell(x: Floats) -> Floats:
    """A factor that grows with x in -1..1, 1 at 0, and is inverted by -x."""
    return (1 + x) / (1 - x)


class World:
    """Everything about one video but its pixels.

    config: a `synth.SynthConfig`; seed: integers.

    Attributes:
        strengths: the strength of each dial in this video, 0..1. attributes: those of at least 0.5.
        object_class: a name of `SKELETONS`, or blob.
        outline_xywh (T, 4): tight box of the target's whole outline, also where it is hidden or
            outside.
        boxes_xywh (T, 4): its part inside the frame, as GOT-10k labels it; all zero where nothing
            is inside.
        cover (T,): GOT-10k's levels 0..8 of the visible share of the target's area, measured on
            some hundred points that move with it. absent (T,): nothing is visible. cut (T,): the
            outline crosses the border.
    """

    def __init__(self, config, seed: tuple[int, ...]):
        self.config, self.frames = config, config.frames
        self.size = (config.width, config.height)
        draw = Draw(21, config.bank, *seed)
        # a second source, so that the dials that came later change nothing at 0
        later = Draw(22, config.bank, *seed)
        self.strengths = config.draw_strengths(draw, later)
        self.attributes = tuple(name for name, s in self.strengths.items() if s >= 0.5)
        self._bank = BANK_SIZES[config.bank]
        self._backdrop = background(config.bank, draw.below(self._bank.backgrounds))
        self.bodies = self._cast(draw, later)
        self.target = [body.role for body in self.bodies].index("target")
        self._owner = np.array([b for b, body in enumerate(self.bodies) for _ in body.skeleton])
        self._slot = [k for body in self.bodies for k in range(len(body.skeleton))]
        self._target_parts = np.nonzero(self._owner == self.target)[0]
        self._move(draw, later)
        self._label()
        self._light(draw)

    # --- who is in it -----------------------------------------------------------------------------

    def _cast(self, draw: Draw, later: Draw) -> list[Body]:
        s = self.strengths
        self.object_class = (
            list(SKELETONS)[draw.below(len(SKELETONS))] if s["articulation"] > 0 else "blob"
        )
        skeleton = SKELETONS.get(self.object_class, RIGID)
        wears = self._choose(draw, later)
        target = self._body("target", draw, skeleton, wears)
        bodies = [
            self._body("clutter", draw, RIGID, (wears, self._any_texture(draw))[draw.below(2)])
            for _ in range(int(s["clutter"] * 7 + 0.5))
        ]
        twins = int(s["distractors"] * 2 + 0.9)
        for k in range(twins + int(s["team"] * 5 + 0.5)):
            mate = k >= twins
            twin = self._body("distractor", later if mate else draw, skeleton, wears)
            twin.textures = [
                (which, (x + 29 * k + 17) % PIECE, (y + 41) % PIECE)
                for which, x, y in target.textures
            ]
            twin.later, twin.tint, twin.tint_weight = twin.textures, target.tint, target.tint_weight
            if mate or draw.below(2):
                twin.shapes = target.shapes
            bodies.append(twin)
        bodies.append(target)
        bodies += [self._body("occluder", draw, RIGID, self._any_texture(draw))
                   for _ in range(int(s["occlusion"] * 2 + 0.9))]  # fmt: skip
        return bodies

    def _any_texture(self, draw: Draw) -> int:
        return draw.below(self._bank.textures)

    def _choose(self, draw: Draw, later: Draw) -> int:
        """The target's texture: of three, the one least like the background; in dull worlds the
        middle one.
        """

        def distance(which: int) -> int:
            pair = zip(texture(self.config.bank, which).mean, self._backdrop.mean, strict=True)
            return sum(abs(a - b) for a, b in pair)

        choice = [self._any_texture(draw) for _ in range(3)]
        rank = 1 if self.strengths["low_contrast"] > 0.3 else 2
        if self.config.vary and self.config.camouflage and later.below(2):
            rank = later.below(3)
        return sorted(choice, key=distance)[rank]

    def _body(self, role: str, draw: Draw, skeleton: tuple[Part, ...], wears: int) -> Body:
        def dresses(first: int) -> list[tuple[int, int, int]]:
            whole = [first] + [
                first if draw.below(3) == 0 else self._any_texture(draw) for _ in range(3)
            ]
            return [(which, draw.below(PIECE), draw.below(PIECE)) for which in whole]

        now, later = dresses(wears), dresses(self._any_texture(draw))
        plain = role == "occluder" and draw.below(2) == 0
        shapes = [
            draw.below(8) if part.plain or plain else 8 + draw.below(self._bank.shapes - 8)
            for part in skeleton
        ]
        tint = pack(np.array([40 + draw.below(176) for _ in range(3)]))
        dress, dress_later = ([look[p.dress] for p in skeleton] for look in (now, later))
        seed = np.uint64(draw.below(110))
        return Body(role, skeleton, shapes, dress, dress_later, tint, seed)

    # --- where it moves ---------------------------------------------------------------------------

    def _move(self, draw: Draw, later: Draw) -> None:
        s, count, frames = self.strengths, len(self.bodies), self.frames
        short = min(self.size)
        # Smooth curves in -1..1: 7 for each body, and the last row for the camera; then 4 jerky
        # ones.
        slow = spline(draw.unit(count + 1, 7, frames // SLOW + 4) * 2 - 1, SLOW, frames)
        quick = spline(draw.unit(4, frames // QUICK + 4) * 2 - 1, QUICK, frames)
        slow_0, quick_0 = slow - slow[..., :1], quick - quick[..., :1]
        u = draw.unit(count, 12)
        target, roles = self.target, np.array([body.role for body in self.bodies])
        twin, dead = roles == "distractor", (roles == "clutter") | (roles == "occluder")
        alive = (~dead)[:, None]

        # Sizes. `size` is the target's: the geometric mean of its half sides, in pixels.
        usual = short * draw.between(0.1, 0.19)
        size = usual * _swell(s["size"] * later.between(-0.9, 0.9))
        size = min(max(size, 0.03 * short), 0.42 * short)
        base = np.where(roles == "clutter", usual, size)
        base[roles == "clutter"] *= (0.4 + 0.8 * u[:, 0])[roles == "clutter"]
        base[twin] *= (0.85 + 0.3 * u[:, 0])[twin]
        base[roles == "occluder"] *= (0.55 + 0.35 * u[:, 0] + 0.45 * s["occlusion"])[
            roles == "occluder"
        ]
        zoom = _swell(s["camera"] * 0.14 * slow[count, 2])
        radius = base[:, None] * _swell(alive * s["scale"] * 0.5 * slow[:count, 2]) * zoom
        radius[target] = np.minimum(radius[target], 0.42 * short)

        jointed = np.array([len(body.skeleton) > 1 for body in self.bodies])
        roll = s["camera"] * 0.06 * slow_0[count, 3]
        lean = np.where(jointed, 0.06, 1.0) * (u[:, 1] - 0.5)
        angle = lean[:, None] + alive * s["rotation"] * 0.6 * slow_0[:count, 3] + roll

        slim = 0.3 * (u[:, 2] - 0.5)
        # poles and boards
        slim[roles == "occluder"] = np.where(u[:, 2] < 0.5, -0.3, 0.1)[roles == "occluder"]
        stretch = _swell(slim[:, None] + alive * 0.34 * s["aspect"] * slow[:count, 4])
        half_w, half_h = radius * stretch, radius / stretch
        time = np.arange(frames) / max(frames - 1, 1)
        drift = s["appearance"] * np.clip(time * 1.15 + 0.15 * slow_0[target, 5], 0, 1)
        # turns out of the plane half-way
        half_w[target] *= 1 - 1.6 * s["appearance"] * drift * (1 - drift)
        self._drift = np.floor(drift * 16 + 0.5).astype(np.int64)

        centre = self._travel(
            draw, u, slow_0, quick_0, size, roll, zoom, np.stack([half_w, half_h]), roles
        )
        self._join(u, slow, angle, half_w, half_h, centre)
        # The background, from frame to texels.
        k = draw.between(0.75, 1.4)
        c, d = circle(-roll)
        c, d = c * k / zoom, d * k / zoom
        x, y = (self.size[axis] / 2 + self._camera[axis] for axis in (0, 1))
        left, top = draw.between(0, 512), draw.between(0, 512)
        self._to_backdrop = np.stack([c, -d, left - c * x + d * y, d, c, top - d * x - c * y])

    def _travel(
        self, draw: Draw, u: Floats, slow: Floats, quick: Floats, size: float,
        roll: Floats, zoom: Floats, half: Floats, roles: NDArray[np.str_],
    ) -> Floats:  # fmt: skip
        """Centres of all bodies in the frame, (count, 2, T). First the world, then the camera."""
        s, count, frames, target = self.strengths, len(self.bodies), self.frames, self.target
        middle = np.array([[self.size[0] / 2], [self.size[1] / 2]])
        self._camera = min(self.size) * (
            0.3 * s["camera"] * slow[count, :2] + 0.05 * s["fast"] * quick[2:]
        )
        c, d = (k * zoom for k in circle(roll))

        # (..., 2, T): the camera turns and zooms about the frame's middle
        def view(place: Floats) -> Floats:
            x, y = place[..., 0, :] - middle[0], place[..., 1, :] - middle[1]
            return np.stack([c * x - d * y, d * x + c * y], -2) + middle + self._camera

        margin = 0.8 * size
        start = margin + u[:, 3:5, None] * (2 * middle - 2 * margin)
        path = start[target] + 3 * size * s["motion"] * slow[target, :2]
        seen = view(path + s["fast"] * 3.6 * size * quick[:2])
        # the target is reflected before it leaves the frame
        for axis, length in enumerate(self.size):
            span = length - 2 * margin
            folded = (seen[axis] - margin) % (2 * span)
            seen[axis] = margin + np.where(folded > span, 2 * span - folded, folded)
        if s["out_of_view"] > 0:
            self._leave(draw, seen, half[:, target].max(0))
        centre = view(np.broadcast_to(start, (count, 2, frames)))
        centre[target] = seen
        near = np.minimum(3 * np.arange(frames) / frames, 1)  # twins keep their distance at first
        for order, body in enumerate(np.nonzero(roles == "distractor")[0]):
            away = u[body, 5] + 0.12 * slow[body, 3]
            far = size * (2.1 + 1.5 * u[body, 6] + 0.8 * max(order - 1, 0))  # a team stands around
            centre[body] = seen + far * np.stack(circle(away))
            centre[body] += (0.5 + 0.5 * u[body, 7]) * size * near * slow[body, :2]
        occluders = np.nonzero(roles == "occluder")[0]
        # each crosses the target's path at a moment of its own
        for k, body in enumerate(occluders):
            moment = (0.35 + 0.45 * (k + u[body, 5]) / len(occluders)) * (frames - 1)
            extent = half[:, body].max(-1) + half[:, target].max(-1)
            ahead = np.array(circle(u[body, 6]))
            miss = 0.9 * size * (1 - s["occlusion"]) * (1 if u[body, 8] < 0.5 else -1)
            aside = np.array([-ahead[1], ahead[0]]) * miss
            # not in the way at first
            clear = 1.3 * np.sqrt(extent[0] * extent[0] + extent[1] * extent[1])
            speed = max(clear / max(moment, 1.0), size * (0.1 + 0.12 * u[body, 7]))
            meet = (seen[:, int(moment)] + aside)[:, None]
            centre[body] = meet + ahead[:, None] * (speed * (np.arange(frames) - moment))
        self._velocity = np.diff(seen, axis=1, append=seen[:, -1:])
        return centre

    def _leave(self, draw: Draw, seen: Floats, radius: Floats) -> None:
        """Let the target leave through a side of the frame for a while, and come back."""
        axis, far = draw.below(2), draw.below(2)
        outside = self.size[axis] + 1.3 * radius if far else -1.3 * radius
        moment, ramp = draw.between(0.4, 0.7) * self.frames, 0.22 * self.frames
        x = np.clip(1.3 - np.abs(np.arange(self.frames) - moment) / ramp, 0, 1)
        x = x * x * (3 - 2 * x) * self.strengths["out_of_view"]
        seen[axis] += x * (outside - seen[axis])

    def _join(
        self, u: Floats, slow: Floats, angle: Floats, half_w: Floats, half_h: Floats, centre: Floats
    ) -> None:
        """Maps between the frame and every part's square, (6, P, T): x' = a u + b v + e, y' = c u +
        d v + f.
        """
        s, own, frames = self.strengths, self._owner, np.arange(self.frames)
        cos, sin = circle(angle)
        a, b, e = (cos * half_w)[own], (-sin * half_h)[own], centre[own, 0]
        c, d, f = (sin * half_w)[own], (cos * half_h)[own], centre[own, 1]
        parts = [part for body in self.bodies for part in body.skeleton]
        x, y, length, width, turn, swing, phase = np.array(
            [[p.x, p.y, p.length, p.width, p.turn, p.swing, p.phase] for p in parts]
        ).T[..., None]
        beat = (u[:, 9:10] + (0.05 + 0.07 * u[:, 10:11]) * frames)[own] + phase
        turn = (
            turn + swing * s["articulation"] * (0.7 + 0.3 * slow[:-1, 6])[own] * sine(beat) - 0.25
        )
        # A part's own axes: u across, v from the hinge outwards.
        cos, sin = circle(turn)
        pa, pb, pc, pd = cos * width, -sin * length / 2, sin * width, cos * length / 2
        whole = length == 2  # a body of one part turns about its middle
        pe, pf = np.where(whole, 0.0, x + 0.85 * pb), np.where(whole, 0.0, y + 0.85 * pd)
        m = np.stack([a * pa + b * pc, a * pb + b * pd, a * pe + b * pf + e,
                      c * pa + d * pc, c * pb + d * pd, c * pe + d * pf + f])  # fmt: skip
        det = m[0] * m[4] - m[1] * m[3]
        self._to_frame = m
        self._to_part = (
            np.stack(
                [m[4], -m[1], m[1] * m[5] - m[4] * m[2], -m[3], m[0], m[3] * m[2] - m[0] * m[5]]
            )
            / det
        )
        # Bending: two shears of the part's square, u + p sin(v), then v + q sin(u); each has an
        # exact inverse.
        soft = np.array([body.role in ("target", "distractor") for body in self.bodies])[own, None]
        amount = (
            soft * s["deformation"] * np.where(whole, 0.2, 0.12) * (0.75 + 0.25 * slow[:-1, 5][own])
        )
        self._bend = np.stack([amount, 0.8 * amount])
        self._bent_parts = (amount != 0).any(1)
        self._bend_waves = 0.18 + 0.15 * u[own, 11]  # turns of the sine for each unit of the square
        speed = np.stack([0.03 + 0.05 * u[own, 9:10], -0.03 - 0.05 * u[own, 10:11]])
        self._bend_phase = (speed * frames + u[own, 10:11]) % 1.0
        right, down = ([np.abs(m[k]) * (1 + amount) for k in row] for row in ((0, 1), (3, 4)))
        self._reach = np.stack([right[0] + right[1], down[0] + down[1]])

    # --- labels -----------------------------------------------------------------------------------

    def _shape(self, part: int) -> Shape:
        return shape(self.config.bank, self.bodies[self._owner[part]].shapes[self._slot[part]])

    def _place(self, parts: Ints, points: Floats) -> Floats:
        """Points (P', N, 2) of some parts' squares in the pixels of all frames: (2, P', T, N)."""
        u, v = points[:, None, :, 0], points[:, None, :, 1]
        if self._bent_parts[parts].any():
            (p, q), (first, second) = (
                self._bend[:, parts, :, None],
                self._bend_phase[:, parts, :, None],
            )
            waves = self._bend_waves[parts, None, None]
            u = u + p * sine(v * waves + first)
            v = v + q * sine(u * waves + second)
        m = self._to_frame[:, parts, :, None]
        return np.stack([m[0] * u + m[1] * v + m[2], m[3] * u + m[4] * v + m[5]])

    def _inside(self, part: int, frames: Ints, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Which points (..., T', N), in the pixels of the given frames, lie on a part."""
        m = self._to_part[:, part, frames, None]
        u, v = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
        if self._bent_parts[part]:
            (p, q), (first, second) = (
                self._bend[:, part, frames, None],
                self._bend_phase[:, part, frames, None],
            )
            v = v - q * sine(u * self._bend_waves[part] + second)
            u = u - p * sine(v * self._bend_waves[part] + first)
        column = np.clip((u + 1) * (SPRITE // 2), 0, SPRITE - 1).astype(np.int64)
        row = np.clip((v + 1) * (SPRITE // 2), 0, SPRITE - 1).astype(np.int64)
        return self._shape(part).inside.take(row * SPRITE + column)

    def _label(self) -> None:
        parts = self._target_parts
        shapes = [self._shape(part) for part in parts]
        each = POINTS // len(parts)
        placed = self._place(
            parts, np.stack([np.concatenate([x.outline, x.points[:each]]) for x in shapes])
        )
        edge, points = placed[..., :OUTLINE], placed[..., OUTLINE:]
        low, high, limit = edge.min((1, 3)), edge.max((1, 3)), np.array(self.size)[:, None]
        self.outline_xywh = np.concatenate([low, high - low]).T
        seen_low, seen_high = np.clip(low, 0, limit), np.clip(high, 0, limit)
        self.boxes_xywh = np.concatenate([seen_low, seen_high - seen_low]).T
        self.boxes_xywh[(seen_high <= seen_low).any(0)] = 0
        self.cut = ((low < 0) | (high > limit)).any(0)

        # A point stands for its share of its part's area; one under a later part of the target for
        # nothing.
        m = self._to_frame[:, parts, 0]
        area = np.abs(m[0] * m[4] - m[1] * m[3]) * [x.area for x in shapes]
        share = np.floor(area[:, None] * np.ones(each) * (1e6 / (area.sum() * each))).astype(
            np.int64
        )
        if len(parts) > 1:
            m = self._to_part[:, parts, 0][..., None, None]
            x, y = points[:, :, 0]
            u, v = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
            # (later part, part, point), as if all were plain
            under = u * u * u * u + v * v * v * v < 0.6
            later = np.arange(len(parts))[:, None] > np.arange(len(parts))
            share[(under & later[..., None]).any(0)] = 0
        x, y = points
        shown = (x >= 0) & (x < self.size[0]) & (y >= 0) & (y < self.size[1])  # (parts, T, points)
        middle, reach = self._to_frame[2::3, parts[-1] + 1 :], self._reach[:, parts[-1] + 1 :]
        touch = ((middle - reach < high[:, None]) & (middle + reach > low[:, None])).all(0)
        for part, frames in enumerate(touch, parts[-1] + 1):
            at = np.nonzero(frames)[0]
            if len(at):
                shown[:, at] &= ~self._inside(part, at, x[:, at], y[:, at])
        count, total = (shown * share[:, None]).sum((0, 2)), int(share.sum())
        steps = (20 * count + 3 * total - 1) // (3 * total)  # of 15 %, upwards
        self.cover = np.where(count == total, 8, np.minimum(steps, 7))
        self.absent = count == 0

    # --- light ------------------------------------------------------------------------------------

    def _light(self, draw: Draw) -> None:
        s, frames = self.strengths, self.frames
        wave = spline(draw.unit(8, frames // SLOW + 4) * 2 - 1, SLOW, frames)
        dull = s["low_contrast"] * 0.55
        mood = s["illumination"]
        gain = (1 - dull) * (1 - mood * (0.32 + 0.32 * wave[0]))
        room = 1 - gain
        lift = room * np.clip(0.45 * dull + mood * (0.3 + 0.45 * wave[1]), 0.0, 0.9)
        cast = 1 + 0.25 * mood * wave[2:5]
        self._gain = np.floor(gain * 256 + 0.5).astype(np.int64)
        bias = np.minimum(np.floor(lift * cast * 255), 255 - ((255 * self._gain) >> 8) - 1)
        self._bias = pack(np.maximum(bias, 0).astype(np.int64).T)
        self._shadow_turn, self._shadow_at = draw.between(0, 1), 0.5 + 0.6 * wave[5]
        self._shadow_depth = int(mood * 140 * draw.between(0.3, 1))
        self._grey = np.uint64(int(s["colourless"] * 236 + 0.5))
        along = self._velocity * 0.5 * s["blur"]
        length = np.sqrt((along * along).sum(0))
        along = along * np.minimum(1, 9 / np.maximum(length, 1e-9))
        soft = s["blur"] * (1.6 + 1.4 * wave[6])
        # (2 passes, 2, T) pixels
        self._smear = np.stack([along, np.stack([soft, 0.6 * soft]) * 0.7071], 0)
        self._smear[1, 1] += 0.4 * soft
        self._noise = s["noise"] * 0.17  # of the tape: a standard deviation of up to 12
        self._noise_at = np.floor(draw.unit(frames) * (1 << 18)).astype(np.int64)
