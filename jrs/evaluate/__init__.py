"""What a bundle is worth: accuracy on pairs of cases, beside other registration programs, with paired tests."""
