"""Figures of other papers, accuracy in % on the 2,468 test clouds of ModelNet40.

* IF-Defense's tables 2 to 5, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. Each row attacks a
  classifier trained for its defence; the settings of the attacks are the defaults of `attacks`.
* PCLD, from ``result_files/maxvals.csv`` of `its code
  <https://github.com/batuceng/diffusion-layer-robustness-pc>`_: the attacks with the budgets of ours.

APC (`arXiv:2604.15708 <https://arxiv.org/abs/2604.15708>`_) is compared by a mean over 11 attacks, and no
figure of one attack with our protocol was found, so nothing of it is here.
"""

from __future__ import annotations

from typing import Any

_ATTACKS = ("none", "perturb", "add-cd", "add-hd", "knn", "drop-100", "drop-200", "lg-gan", "advpc")
_ROWS = {
    "pointnet": {
        "none": (88.41, 0.00, 0.00, 0.00, 8.51, 64.67, 40.24, 4.40, 0.00),
        "srs": (87.44, 77.47, 76.34, 73.66, 57.41, 63.57, 39.51, 11.72, 49.01),
        "sor": (87.88, 82.81, 82.58, 82.25, 76.63, 64.75, 42.59, 34.90, 75.45),
        "onet-mesh": (83.95, 83.31, 84.76, 83.79, 84.28, 77.76, 66.94, 50.00, 75.62),
        "dup-net": (87.76, 84.56, 83.63, 82.16, 80.31, 67.30, 46.92, 35.81, 77.55),
        "onet-opt": (87.07, 85.78, 85.94, 85.94, 86.18, 77.63, 65.28, 52.10, 80.14),
        "convonet-opt": (87.64, 86.30, 86.83, 86.75, 86.95, 77.39, 64.63, 48.11, 80.72),
    },
    "pointnet2-ssg": {
        "none": (89.34, 0.00, 7.24, 6.59, 0.00, 80.19, 68.96, 10.12, 0.56),
        "srs": (83.59, 73.14, 65.32, 43.11, 49.96, 64.51, 39.63, 7.94, 48.37),
        "sor": (86.95, 77.67, 72.90, 72.41, 61.35, 74.16, 69.17, 11.11, 66.26),
        "onet-mesh": (83.27, 81.65, 77.71, 79.13, 72.57, 82.46, 72.93, 18.96, 65.97),
        "dup-net": (85.78, 80.63, 75.81, 72.45, 74.88, 76.38, 72.00, 14.76, 64.76),
        "onet-opt": (87.64, 85.21, 78.44, 73.87, 85.37, 79.38, 75.12, 21.38, 74.63),
        "convonet-opt": (89.02, 86.99, 80.19, 76.09, 85.62, 84.56, 79.09, 17.52, 77.06),
    },
    "dgcnn": {
        "none": (91.49, 0.00, 1.46, 1.42, 20.02, 75.16, 55.06, 15.41, 9.23),
        "srs": (81.32, 50.20, 63.82, 43.35, 41.25, 49.23, 23.82, 20.07, 41.62),
        "sor": (88.61, 76.50, 72.53, 63.74, 55.92, 64.68, 59.36, 30.82, 56.49),
        "onet-mesh": (83.91, 81.56, 81.73, 67.50, 79.38, 78.97, 70.34, 46.09, 65.54),
        "dup-net": (53.54, 42.67, 44.94, 33.02, 35.45, 44.45, 36.02, 21.38, 29.38),
        "onet-opt": (88.25, 82.25, 81.77, 67.75, 82.29, 79.25, 73.30, 53.08, 76.01),
        "convonet-opt": (89.22, 85.53, 84.20, 72.93, 82.33, 83.43, 73.22, 50.70, 79.14),
    },
    "pointconv": {
        "none": (88.49, 0.00, 0.54, 0.68, 3.12, 77.96, 64.02, 4.42, 6.45),
        "srs": (85.23, 76.22, 71.31, 61.98, 55.75, 69.45, 48.87, 5.10, 37.62),
        "sor": (87.28, 79.25, 82.41, 72.73, 26.13, 77.63, 63.78, 5.48, 51.75),
        "onet-mesh": (82.78, 81.73, 81.85, 75.61, 77.15, 75.97, 68.44, 15.46, 53.81),
        "dup-net": (78.73, 68.84, 72.61, 61.14, 43.76, 70.75, 58.23, 5.02, 49.35),
        "onet-opt": (86.10, 83.55, 83.95, 76.86, 80.47, 78.85, 70.34, 18.78, 61.77),
        "convonet-opt": (88.21, 86.67, 85.62, 82.13, 81.08, 81.20, 74.51, 16.55, 59.82),
    },
}


def accuracy(victim: str, defence: str, attack: str) -> float | None:
    """A published figure.

    Args:
        victim: a name that starts with that of a network, such as ``"dgcnn-modelnet40"``.
        defence: name of the defence; the ``local-*`` methods and ``convonet-mesh`` are not from that paper.
        attack: name of the attack in the suite, or ``"none"``.

    Returns:
        Accuracy in %, ``None`` if not published.
    """
    network = max((name for name in _ROWS if victim.startswith(name)), key=len, default=None)
    if network is None or defence not in _ROWS[network] or attack not in _ATTACKS:
        return None
    return _ROWS[network][defence][_ATTACKS.index(attack)]


_PCLD = {
    "pointnet": {"pgd-linf": 72.1, "drop-200": 71.0},
    "pointnet2": {"pgd-linf": 68.0, "drop-200": 83.1},
    "dgcnn": {"pgd-linf": 76.1, "drop-200": 75.0},
    "pct": {"pgd-linf": 69.3, "drop-200": 77.9},
}
_LINKS = {
    "IF-Defense": "https://arxiv.org/abs/2010.05272",
    "PCLD": "https://github.com/batuceng/diffusion-layer-robustness-pc",
}


def comparable(data: str, victim: str, defence: str, source: str) -> list[dict[str, Any]]:
    """Published figures of static attacks with the same protocol: data set, network, attack and budget.

    Args:
        data: name of the data set.
        victim: name that starts with that of a network.
        defence: name of the defence. Figures of IF-Defense are of the same method, those of PCLD are of that
            purifier, beside any other.
        source: name of an attack in the suite, or ``"clean"``.

    Returns:
        ``paper``, ``link``, ``accuracy``, and in words what ``differs``, for each.
    """
    if data != "modelnet40" or "modelnet40" not in victim:
        return []
    attack = "none" if source == "clean" else source
    found: list[dict[str, Any]] = []
    own = accuracy(victim, defence, attack)
    if own is not None:
        differs = "2,468 clouds, a classifier trained for that defence"
        differs += "" if attack == "none" else ", the attack's published settings"
        found.append({"paper": "IF-Defense", "accuracy": own, "differs": differs})
    network = max((name for name in _PCLD if victim.startswith(name)), key=len, default=None)
    other = None if network is None or defence == "none" else _PCLD[network].get(attack)
    if other is not None:
        differs = "another purifier, 2,468 clouds, best of many step lists on the test clouds"
        differs += ", 30 steps of 0.002" if attack == "pgd-linf" else ""
        found.append({"paper": "PCLD", "accuracy": other, "differs": differs})
    return [{**each, "link": _LINKS[each["paper"]]} for each in found]
