"""From images and a list of bases to a ranking, and how good rankings are."""
