"""The shape of the loss around a run: curvature, river and valley, hopping. Needs extra ``landscape``.

hessian     the loss as a function of one vector; Hessian-vector products; dense Hessians; extreme eigenpairs
spectrum    all eigenvalues, exact or as a stochastic Lanczos density
valley      river and valley, split by a threshold, and what the split's sizes depend on
information matrix entropy, mutual information of Hessians, phases
hopping     how a trajectory moves in valley and river
cuts        the loss along one direction: U or V?
plane       the loss on a plane that the run's path lies near
upstream    whether Single's and Looped's gradients agree
survey      all of it at points along a recorded run
report      a survey as numbers, pictures and one HTML file
"""
