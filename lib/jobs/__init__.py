"""What joins the rooms: a run embedded, admitted, validated, verified."""
