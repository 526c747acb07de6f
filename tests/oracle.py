"""NaViT for one image, in plain numpy float64: no masks, slots or segment ids.

Written from the paper and the cited formulas, sharing no code with the package; the
packed model must agree with it. Shapes: n tokens of the image, P values a patch,
D width, H heads, K head width.
"""

import math

import numpy as np


def forward(params, patches, coords, grid, *, num_heads, positions, pooling="map"):
    """Returns tokens [n D] and the pooled vector [D] of one image [n P]."""
    position = place(params.get("position_embedding", {}), positions, coords, grid)
    x = dense(params["patch_embedding"], patches)
    angles = None
    if positions["name"] == "rope":
        angles = rope_angles(coords, grid, x.shape[1] // num_heads, positions)
    else:
        x = x + position(x.shape[1])
    blocks = params["blocks"]
    for layer in range(len(blocks["norm_1"]["scale"])):
        block = take(blocks, layer)
        x = x + attention(block["attention"], norm(block["norm_1"], x), angles)
        x = x + mlp(block["mlp"], norm(block["norm_2"], x))
    x = norm(params["norm"], x)
    if pooling == "mean":
        return x, sum(x) / len(x)
    pool = params["pool"]
    query = heads(pool["query"], pool["probe"])
    z = merge(
        pool["out"], attend(query, heads(pool["key"], x), heads(pool["value"], x))
    )
    return x, (z + mlp(pool["mlp"], norm(pool["norm"], z)))[0]


def take(tree, layer):
    return {
        k: take(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()
    }


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(p, x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p.get("bias", 0.0)


def mlp(p, x):
    x = dense(p["up"], x)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return dense(p["down"], 0.5 * x * (1 + np.tanh(inner)))


def heads(p, x):
    """[n D] -> [H n K]."""
    kernel = p["kernel"]
    bias = p.get("bias", np.zeros(kernel.shape[1:]))
    return np.stack([x @ kernel[:, h] + bias[h] for h in range(kernel.shape[1])])


def merge(p, x):
    """[H n K] -> [n D]."""
    return sum(x[h] @ p["kernel"][h] for h in range(len(x))) + p.get("bias", 0.0)


def attend(query, key, value):
    output = np.zeros((len(query), query.shape[1], value.shape[2]))
    for h in range(len(query)):
        for i, q in enumerate(query[h]):
            scores = key[h] @ q / math.sqrt(len(q))
            weights = np.exp(scores - scores.max())
            output[h, i] = weights @ value[h] / weights.sum()
    return output


def attention(p, x, angles):
    query, key, value = (heads(p[name], x) for name in ("query", "key", "value"))
    if "query_norm" in p:
        query, key = norm(p["query_norm"], query), norm(p["key_norm"], key)
    if angles is not None:
        query, key = turn(query, angles), turn(key, angles)
    return merge(p["out"], attend(query, key, value))


def turn(x, angles):
    """Rotation as a product of complex numbers."""
    K = x.shape[-1]
    turned = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def place(p, section, coords, grid):
    """The position of each token as a function of the width, by the scheme's name."""
    section = dict(section)
    scheme = SCHEMES[section.pop("name")]
    return lambda width: np.stack(
        [scheme(p, c, grid, width, **section) for c in coords]
    )


def fractions(coord, grid, coordinates, fraction="centre"):
    """Coordinates in [0, 1] of one patch."""
    result = []
    for i, side in zip(coord, grid, strict=True):
        n = max(grid) if coordinates == "aspect_preserving" else side
        result.append(
            {
                "centre": (i + 0.5) / n,
                "start": i / n,
                "corners": i / (n - 1) if n > 1 else 0.0,
            }[fraction]
        )
    return result


def entries(coord, grid, length, coordinates="absolute", fraction="centre"):
    """Real-valued places in a table of `length`."""
    if coordinates == "absolute":
        return [float(i) for i in coord]
    return [f * (length - 1) for f in fractions(coord, grid, coordinates, fraction)]


def interpolate(table, at):
    return np.array([np.interp(at, range(len(table)), column) for column in table.T])


def factorized(p, coord, grid, width, length=64, combine="sum", **where):
    at = entries(coord, grid, length, **where)
    parts = [interpolate(t, x) for t, x in zip(p["tables"], at, strict=True)]
    if combine == "stack":
        return np.concatenate(parts)
    return np.sum(parts, 0) if combine == "sum" else np.prod(parts, 0)


def sinusoidal(p, coord, grid, width, length=64, **where):
    half = width // len(coord) // 2
    table = np.zeros((length, 2 * half))
    for j in range(length):
        for i in range(half):
            table[j, i] = math.sin(j / 10000 ** (i / half))
            table[j, half + i] = math.cos(j / 10000 ** (i / half))
    at = entries(coord, grid, length, **where)
    return np.concatenate([interpolate(table, x) for x in at])


def fourier(p, coord, grid, width, length=64, **where):
    at = np.array(entries(coord, grid, length, **where)) / (length - 1)
    angle = at @ p["kernel"] + p["bias"]
    return np.concatenate([np.sin(angle), np.cos(angle)])


def learned_2d(p, coord, grid, width, length=64):
    return p["table"][tuple(coord)]


def learned_1d(p, coord, grid, width, side=16, filter="bilinear"):
    return resize(p["table"], grid, filter)[tuple(coord)]


def rope_angles(coords, grid, head_width, section):
    section = dict(section)
    section.pop("name")
    length = section.pop("length", 64)
    pairs, axes = head_width // 2, len(grid)
    shares = [pairs // axes + (a < pairs % axes) for a in range(axes)]
    return np.array(
        [
            [
                at / 10000 ** (i / share)
                for at, share in zip(
                    entries(c, grid, length, **section), shares, strict=True
                )
                for i in range(share)
            ]
            for c in coords
        ]
    )


def resize(table, grid, filter):
    """The whole table [h w D] resized to the grid, one axis after the other."""
    rows = resize_matrix(table.shape[0], grid[0], filter)
    columns = resize_matrix(table.shape[1], grid[1], filter)
    return np.einsum("ih,jw,hwD->ijD", rows, columns, table)


def resize_matrix(old, new, filter):
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        if filter == "antialias":
            reach = max(old / new, 1.0)
            for j in range(old):
                matrix[i, j] = max(0.0, 1 - abs(j - centre) / reach)
            matrix[i] /= matrix[i].sum()
            continue
        kernel, taps = (
            (triangle, (0, 1)) if filter == "bilinear" else (cubic, range(-1, 3))
        )
        for tap in taps:
            j = math.floor(centre) + tap
            matrix[i, min(max(j, 0), old - 1)] += kernel(abs(centre - j))
    return matrix


def triangle(x):
    return max(0.0, 1 - x)


def cubic(x, a=-0.75):
    """Keys 1981, equation 15."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


SCHEMES = {
    "factorized": factorized,
    "sinusoidal": sinusoidal,
    "fourier": fourier,
    "learned_1d": learned_1d,
    "learned_2d": learned_2d,
    "rope": None,
}
