"""How figures are written."""

from rotquant_tvm.evaluation.figures import figure_cells


def test_a_row_of_figures():
    row = {"perplexity": 19.5448, "perplexity_change": 0.0164, "kl": 0.014812, "kl_standard_error": 0.0004}
    row |= {"top1_agreement": 0.9315, "tokens": 8176, "seconds": 69.37}
    assert figure_cells(row) == ["19.545", "+1.64 %", "0.01481", "0.00040", "93.15 %", "8,176", "69.4"]
