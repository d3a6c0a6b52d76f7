"""FASTA to plan: records read and checked, identical ones found, packs cut. No torch."""
