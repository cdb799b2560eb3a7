"""`hpm completion SHELL`: scripts that let a shell ask `hpm __complete` (see `completion`)."""

from __future__ import annotations

# Where nothing is printed, the shell completes names of files.
SCRIPTS = {
    "bash": """\
_hpm() {
    local IFS=$'\\n'
    COMPREPLY=($(hpm __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _hpm hpm
""",
    "zsh": """\
#compdef hpm
_hpm() {
    local -a found
    found=("${(@f)$(hpm __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _hpm hpm
""",
    "fish": """\
complete -c hpm -a '(hpm __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
