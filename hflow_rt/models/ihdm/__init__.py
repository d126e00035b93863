"""IHDM: inverse heat dissipation, images from blur to sharp (Rissanen, Heinonen & Solin, ICLR 2023)."""
