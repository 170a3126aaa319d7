"""ERNIE-4.5-MoE (https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf): softmax, renormalised.

Experts are chosen by probability plus a bias; their weights are the probabilities without it.
"""

from emberfed.models.families import Family, Mixture

FAMILY = Family(
    model_type="ernie4_5_moe",
    mixture=Mixture(
        shared_experts="shared_experts",
        num_experts="moe_num_experts",
        intermediate="moe_intermediate_size",
        renormalises=True,
    ),
)
