"""What a run holds of its machine, and must not leave it."""

TOKEN = "hf_aSecretThatNobodyMaySee"
HOME = "/home/maria.secret/projects"
HOST = "maria-workstation-17"
