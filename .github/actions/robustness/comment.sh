#!/usr/bin/env bash
# Write a report as a comment on pull request $NUMBER of $GITHUB_REPOSITORY: the one that begins with the
# report's first line, a marker that nobody sees, is rewritten; where there is none, one is made.
set -euo pipefail
report=$1
[ -s "$report" ] || { echo "no report in $report" >&2; exit 1; }
IFS= read -r MARKER <"$report"
[[ $MARKER == '<!-- crossfire:'*' -->' ]] || { echo "$report: begins with no marker" >&2; exit 1; }
export MARKER

comments=repos/$GITHUB_REPOSITORY/issues/$NUMBER/comments
# Only what a bot wrote: a person may have quoted the report, and that is theirs.
found=$(gh api --paginate "$comments?per_page=100" --jq \
    '.[] | select(.user.type == "Bot" and ((.body // "") | startswith(env.MARKER))) | .id')
first=${found%%$'\n'*}
if [ -n "$first" ]; then
    gh api --method PATCH "repos/$GITHUB_REPOSITORY/issues/comments/$first" --field "body=@$report" --silent
else
    gh api --method POST "$comments" --field "body=@$report" --silent
fi
