package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"sproutd.org/sproutd/dbus/client"
)

// showPlan writes a plan for people.
func showPlan(out io.Writer, plan client.Plan) {
	for _, problem := range plan.Problems {
		fmt.Fprintf(out, "It would be refused: %s\n", problem.Message)
		if remedy := adviceFor(client.CodeOf(problem.Err())).remedy; remedy != "" {
			fmt.Fprintf(out, "  %s\n", remedy)
		}
	}
	if len(plan.Problems) == 0 && len(plan.Steps) == 0 {
		fmt.Fprintln(out, "There is nothing left to do.")
	}
	if len(plan.Steps) > 0 {
		if plan.Resumes {
			fmt.Fprintln(out, "A part was done before. The steps that are left:")
		} else {
			fmt.Fprintln(out, "The steps:")
		}
		for i, step := range plan.Steps {
			fmt.Fprintf(out, "  %d. %s\n", i+1, step.Text)
		}
	}
	if plan.BytesToMove > 0 {
		fmt.Fprintf(out, "To be moved: %s.", size(plan.BytesToMove))
		if plan.TargetSize > 0 {
			fmt.Fprintf(out, " The target has %s and needs %s.", size(plan.TargetSize), size(plan.MinTargetSize))
		}
		fmt.Fprintln(out)
	} else if plan.TargetSize > 0 {
		fmt.Fprintf(out, "The target has %s and needs %s.\n", size(plan.TargetSize), size(plan.MinTargetSize))
	}
	for _, lost := range plan.Destroys {
		fmt.Fprintf(out, "THIS DESTROYS: %s\n", lost)
	}
}

// confirm asks the question that show ends with, on the terminal only.
// Without a terminal, and without --yes, it refuses.
func (a *app) confirm(ctx context.Context, question string, show func(io.Writer)) error {
	if a.yes {
		return nil
	}
	if !terminal(a.in) {
		show(a.err)
		return fail(unconfirmed, "this needs a yes, and there is no terminal to ask on")
	}
	show(a.err)
	fmt.Fprintf(a.err, "%s Type yes to go on: ", question)
	answer := make(chan string, 1)
	go func() { // ends with the process when nobody answers
		line, _ := bufio.NewReader(a.in).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case text := <-answer:
		if strings.EqualFold(text, "yes") || strings.EqualFold(text, "y") {
			return nil
		}
		return fail(unconfirmed, "the answer was not yes")
	case <-ctx.Done():
		fmt.Fprintln(a.err)
		return ctx.Err()
	}
}
